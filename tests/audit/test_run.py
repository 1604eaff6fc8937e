"""The audit on the demo model: what it writes, that it continues, and what it refuses."""

import dataclasses
import errno
import json
import logging
import os
import shutil

import pytest
import torch
from unmemorize import demo
from unmemorize.audit import subject
from unmemorize.audit.config import AuditConfig
from unmemorize.audit.job import FolderTaken
from unmemorize.audit.run import run_audit
from unmemorize.shared.calibration import CalibrationMismatch, NotEnoughControls
from unmemorize.shared.detection import DetectionConfig
from unmemorize.shared.diffusers_adapter import PipelineDenoiser
from unmemorize.shared.prompts import PromptError
from unmemorize.shared.storage import StorageError
from unmemorize.shared.weights import ModelError

MARKUP = "<script>alert(1)</script> [red]x[/red] \x07\u202e قطة 猫"
LONG = " ".join(["word"] * 10_000)


@pytest.fixture(scope="module")
def captions() -> dict[str, list[str]]:
    groups = {}
    for caption in demo.captions():
        groups.setdefault(caption.group, []).append(caption.text)
    return groups


@pytest.fixture(scope="module")
def files(tmp_path_factory, captions):
    """Prompts (with a duplicate, an empty, a strange and an endless one) and controls."""
    folder = tmp_path_factory.mktemp("inputs")
    first = captions["verbatim"][:5]
    prompts = [*first, first[0], "", *captions["learnt"][:4], MARKUP, LONG]
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    controls = captions["held_out"][:12]
    (folder / "controls.txt").write_text("\n".join(controls), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def config(files, tmp_path_factory) -> AuditConfig:
    return AuditConfig(
        model=str(demo.MODEL),
        prompts=(files / "prompts.txt",),
        controls=str(files / "controls.txt"),
        output=tmp_path_factory.mktemp("audit") / "out",
        detection=DetectionConfig(seeds=(0, 1)),
        false_positive_rate=0.25,
        flagged_pictured=2,
        sample=1,
        generation_steps=2,
        device="cpu",
    )


@pytest.fixture(scope="module")
def result(config):
    return run_audit(config)


@pytest.fixture(scope="module")
def denoiser(config):
    """The demo model, loaded once for all tests that only count loads."""
    return subject.Subject(config.model, device="cpu").denoiser


@pytest.fixture
def work(monkeypatch, denoiser) -> dict[str, int]:
    """Counts models loaded, rows denoised and images generated."""
    counts = {"loads": 0, "rows": 0, "images": 0}
    denoise, generate = PipelineDenoiser.denoise, PipelineDenoiser.generate

    def counted_load(*args, **kwargs):
        counts["loads"] += 1
        return denoiser

    def counted_denoise(self, x, sigma, cond):
        counts["rows"] += len(x)
        return denoise(self, x, sigma, cond)

    def counted_generate(self, prompts, seeds, **kwargs):
        counts["images"] += len(seeds)
        return generate(self, prompts, seeds, **kwargs)

    monkeypatch.setattr(subject, "load_denoiser", counted_load)
    monkeypatch.setattr(PipelineDenoiser, "denoise", counted_denoise)
    monkeypatch.setattr(PipelineDenoiser, "generate", counted_generate)
    return counts


def lines(folder):
    # Split at newlines alone: a prompt may hold other separators.
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().split(b"\n")[:-1]]


def test_the_folder_holds_what_the_result_says(result, config):
    entries = lines(config.output)
    assert [e["prompt"] for e in entries] == [e.prompt for e in result.entries]
    assert [e["score"] for e in entries] == [e.score for e in result.entries]
    assert all(e["schema_version"] == 1 for e in entries)
    summary = json.loads((config.output / "summary.json").read_text("utf-8"))
    assert summary == json.loads(json.dumps(result.summary))
    counts = summary["counts"]
    assert counts["prompts"] == len(entries) == 11
    assert (counts["prompts_read"], counts["empty_dropped"], counts["duplicates_merged"]) == (
        13,
        1,
        1,
    )
    assert counts["flagged"] == sum(e["memorized"] for e in entries) == len(result.flagged)
    assert counts["images"] == len(list(config.output.glob("images/*-seed*.png")))
    for entry in entries:
        for image in entry["images"]:
            assert (config.output / image["path"]).is_file()
    assert (config.output / "report.html").stat().st_size > 1000


def test_verdicts_follow_from_the_calibration(result):
    threshold = result.calibration.threshold
    for entry in result.entries:
        assert entry.memorized == (entry.score > threshold)
        trace = torch.tensor(entry.trace, dtype=torch.float64)
        assert entry.score == pytest.approx(trace.mean().item(), rel=1e-12)
        assert entry.q_value >= entry.p_value
        assert (entry.explanation is not None) == entry.memorized
    assert 0 < len(result.flagged) < len(result.entries)


def test_merged_prompts_keep_their_sources(result):
    assert result.entries[0].sources == ("prompts.txt:1", "prompts.txt:6")
    assert result.entries[0].count == 2
    assert result.entries[1].count == 1


def test_the_cut_of_an_endless_prompt_is_named(result, denoiser, caplog):
    entry = next(e for e in result.entries if e.prompt == LONG)
    read = len(LONG.split()) - len(entry.cut.split())
    assert 10 < read < 76  # 75 tokens, a word has one or more
    assert any("too long" in warning for warning in result.summary["warnings"])
    assert result.summary["counts"]["cut"] == 1
    with caplog.at_level(logging.WARNING):
        denoiser.encode([LONG])
    assert "too long for the text encoder" in caplog.text


def test_markup_stays_data_in_results_and_text_in_the_report(result, config):
    assert MARKUP in [e["prompt"] for e in lines(config.output)]
    page = (config.output / "report.html").read_text("utf-8")
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_finished_job_is_used_again_without_loading_the_model(result, config, work):
    names = ("results.jsonl", "report.html", "calibration.json")
    before = {name: (config.output / name).read_bytes() for name in names}
    again = run_audit(config)
    assert work == {"loads": 0, "rows": 0, "images": 0}
    assert again.entries == result.entries
    assert {name: (config.output / name).read_bytes() for name in names} == before


@pytest.mark.parametrize("phase", ["controls", "detection", "explanations", "images"])
def test_a_torn_job_computes_only_what_is_missing(phase, result, config, work, tmp_path):
    """Cut the last line of one journal in half, as a kill does, and everything after it."""
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    phases = ["controls", "detection", "explanations", "images", "similarity"]
    path = output / "journal" / f"{phase}.jsonl"
    content = path.read_bytes()
    lost = content.splitlines(keepends=True)[-1]
    path.write_bytes(content[: -len(lost) // 2])
    for later in phases[phases.index(phase) + 1 :]:
        (output / "journal" / f"{later}.jsonl").unlink()
    again = run_audit(dataclasses.replace(config, output=output))
    assert again.entries == result.entries
    assert (output / "results.jsonl").read_bytes() == (config.output / "results.jsonl").read_bytes()
    keys = [json.loads(line)["key"] for line in path.read_bytes().splitlines()]
    assert len(keys) == len(set(keys)) == content.count(b"\n")
    assert work["loads"] == 1
    if phase == "images":
        assert work["images"] == len(json.loads(lost)["value"]["files"])


@pytest.mark.parametrize(
    "change",
    [
        {"false_positive_rate": 0.5}, {"sample": 2}, {"detection": DetectionConfig(seeds=(0, 2))},
        {"images_per_prompt": 1}, {"dtype": "bfloat16"},
    ],
    ids=str,
)  # fmt: skip
def test_another_job_in_the_folder_is_refused(change, result, config, work):
    before = (config.output / "results.jsonl").read_bytes()
    with pytest.raises(FolderTaken, match=r"holds another audit .*another --output.*--overwrite"):
        run_audit(dataclasses.replace(config, **change))
    assert (config.output / "results.jsonl").read_bytes() == before
    assert work["loads"] == 0


def test_batch_size_is_no_other_job(result, config, work):
    other = dataclasses.replace(config.detection, batch_size=1)
    assert run_audit(dataclasses.replace(config, detection=other)).entries == result.entries
    assert work["rows"] == 0


def test_overwrite_replaces_another_job_and_continues_the_same(result, config, work, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    (output / "mine.txt").write_text("keep me")
    other = dataclasses.replace(
        config, output=output, images_per_prompt=0, explain=0, overwrite=True
    )
    assert run_audit(other).summary["counts"]["images"] == 0
    assert (output / "mine.txt").read_text() == "keep me"
    assert not (output / "images").exists()
    assert work["rows"] > 0
    work["rows"] = 0
    run_audit(other)
    assert work["rows"] == 0


def test_a_folder_with_other_files_is_refused_before_any_work(config, work, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderTaken, match=r"'thesis.tex'.*--overwrite"):
        run_audit(dataclasses.replace(config, output=tmp_path))
    assert work["loads"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(config, work, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="cannot be written"):
            run_audit(dataclasses.replace(config, output=output))
    assert work["loads"] == 0


def test_a_model_that_cannot_be_loaded_leaves_no_folder(config, tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        run_audit(
            dataclasses.replace(config, model=str(tmp_path / "none"), output=tmp_path / "out")
        )
    broken = tmp_path / "broken"
    shutil.copytree(demo.MODEL, broken)
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="safetensors"):
        run_audit(dataclasses.replace(config, model=str(broken), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_calibration_can_be_given_and_must_fit(result, config, work, tmp_path):
    given = dataclasses.replace(
        config, calibration=config.output / "calibration.json", output=tmp_path / "a",
        images_per_prompt=0, explain=0,
    )  # fmt: skip
    again = run_audit(given)
    assert [e.score for e in again.entries] == [e.score for e in result.entries]
    assert again.calibration == result.calibration
    assert again.summary["calibration"]["reused"]
    # Prompts and seeds once, no controls.
    assert work["rows"] == len(again.entries) * 2 + 2

    other = dataclasses.replace(
        given, detection=DetectionConfig(seeds=(0, 3)), output=tmp_path / "b"
    )
    with pytest.raises(CalibrationMismatch, match=r"seeds: calibrated \[0, 1\], now \[0, 3\]"):
        run_audit(other)
    forced = run_audit(dataclasses.replace(other, force=True))
    assert any("other conditions" in caveat for caveat in forced.summary["caveats"])


def test_stopping_early_gives_the_same_verdicts_with_fewer_rows(result, config, work, tmp_path):
    fast = run_audit(
        dataclasses.replace(
            config, calibration=config.output / "calibration.json", output=tmp_path / "a",
            images_per_prompt=0, explain=0, sequential=True,
        )
    )  # fmt: skip
    assert [e.memorized for e in fast.entries] == [e.memorized for e in result.entries]
    assert work["rows"] <= len(fast.entries) * 2 + 2
    undrawn = [e for e in fast.entries if e.trace[-1][0] is None]
    assert work["rows"] == len(fast.entries) * 2 + 2 - len(undrawn)


def test_too_few_controls_and_no_prompts_are_said(config, tmp_path):
    with pytest.raises(NotEnoughControls, match="not enough controls"):
        run_audit(dataclasses.replace(config, false_positive_rate=0.01, output=tmp_path / "a"))
    with pytest.raises(ValueError, match=r"No prompts were named.*--prompts"):
        run_audit(dataclasses.replace(config, prompts=(), output=tmp_path / "b"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(PromptError, match="holds no prompts"):
        run_audit(dataclasses.replace(config, prompts=(tmp_path / "empty.txt",)))


def test_what_cannot_work_claims_no_folder(result, config, tmp_path, work):
    """After an error that names an option, the command with that option must run."""
    output = tmp_path / "out"
    with pytest.raises(NotEnoughControls):
        run_audit(dataclasses.replace(config, false_positive_rate=0.01, output=output))
    assert not output.exists()
    assert work["rows"] == 0


def test_no_space_left_keeps_what_was_computed(config, result, work, tmp_path, monkeypatch):
    output, replace = tmp_path / "out", os.replace

    def full(part, path):
        if path.suffix == ".png":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(part, path)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"No space left to write .*run the same command again"):
        run_audit(dataclasses.replace(config, output=output))
    monkeypatch.setattr(os, "replace", replace)
    rows, images = work["rows"], work["images"]
    assert images == 2  # of the first prompt: they could not be written
    again = run_audit(dataclasses.replace(config, output=output))
    assert again.entries == result.entries
    assert work["images"] - images == result.summary["counts"]["images"]
    assert work["rows"] == rows  # the pipeline's own call is not counted there


def test_training_images_beside_captions_are_compared(config, captions, work, tmp_path):
    """The images an audit generated, put into a training folder, are found to be copies."""
    from PIL import Image

    folder = tmp_path / "training"
    folder.mkdir()
    texts = captions["learnt"][:3]
    for number, text in enumerate(texts):
        noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(number))
        image = Image.fromarray(noise.to(torch.uint8).numpy()).resize((128, 128))
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    settings = {"flagged_pictured": 3, "sample": 3, "images_per_prompt": 1}
    first = dataclasses.replace(config, prompts=(folder,), output=tmp_path / "a", **settings)
    entry = next(e for e in run_audit(first).entries if e.index == 1)
    shutil.copy(tmp_path / "a" / entry.images[0].path, folder / "1.png")
    second = run_audit(dataclasses.replace(first, output=tmp_path / "b"))
    nearest = next(e for e in second.entries if e.index == 1).images[0].nearest
    assert nearest.similarity == pytest.approx(1, abs=1e-3)
    assert nearest.is_own
    assert nearest.caption == texts[1]
    assert nearest.copied is None  # three training images calibrate nothing
    assert any("not enough" in caveat for caveat in second.summary["caveats"])
    assert (tmp_path / "b" / nearest.path).is_file()
