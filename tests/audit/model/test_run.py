"""The audit on the demo model: what it writes, and what decides its verdicts."""

import dataclasses
import json
import logging
import shutil

import jsonschema
import pytest
import torch
from tiny_audit import LONG, MARKUP, lines, schema
from unmemorize.audit.model.run import run_audit
from unmemorize.shared.score.calibration import CalibrationError, CalibrationMismatch
from unmemorize.shared.score.config import DetectionConfig


def test_the_folder_holds_what_the_result_says(result, config):
    entries = lines(config.output)
    assert [e["prompt"] for e in entries] == [e.prompt for e in result.entries]
    assert [e["score"] for e in entries] == [e.score for e in result.entries]
    assert all(e["schema_version"] == 2 for e in entries)
    summary = json.loads((config.output / "summary.json").read_text("utf-8"))
    assert summary == json.loads(json.dumps(result.summary))
    counts = summary["counts"]
    assert counts["prompts"] == len(entries) == 8
    assert (counts["prompts_read"], counts["empty_dropped"], counts["duplicates_merged"]) == (
        10,
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
    threshold = result.calibration.judge.threshold
    for entry in result.entries:
        assert entry.memorized == (entry.score > threshold)
        trace = torch.tensor(entry.trace, dtype=torch.float64)
        assert entry.score == pytest.approx(trace.mean().item(), rel=1e-12)
        assert entry.q_value >= entry.p_value
        assert (entry.explanation is not None) == entry.memorized
    assert 0 < len(result.flagged) < len(result.entries)


def test_merged_prompts_keep_their_sources(result):
    assert result.entries[0].sources == ("prompts.txt:1", "prompts.txt:4")
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


def test_a_calibration_can_be_given_and_must_fit(result, config, work, tmp_path):
    given = dataclasses.replace(
        config, calibration=config.output / "calibration.json", output=tmp_path / "a",
        images_per_prompt=0, explain=0,
    )  # fmt: skip
    again = run_audit(given)
    assert [e.score for e in again.entries] == [e.score for e in result.entries]
    assert again.calibration == result.calibration
    assert again.summary["calibration"]["reused"]
    # Prompts and seeds once, and the magnitude at one seed beside; no controls.
    magnitudes = len(again.entries) + 1
    assert work["rows"] == len(again.entries) * 2 + 2 + magnitudes

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
    magnitudes = len(fast.entries) + 1
    undrawn = [e for e in fast.entries if e.trace[-1][0] is None]
    assert work["rows"] == len(fast.entries) * 2 + 2 + magnitudes - len(undrawn)


def test_suspicious_prompts_are_judged_by_their_collapse(config, captions, work, tmp_path):
    controls = tmp_path / "controls.txt"
    controls.write_text("\n".join(captions["held_out"][:45]), encoding="utf-8")
    settings = dataclasses.replace(
        config, controls=str(controls), false_positive_rate=0.05, output=tmp_path / "a",
        images_per_prompt=0, explain=0, collapse=True,
    )  # fmt: skip
    done = run_audit(settings)
    judge = done.calibration.judge
    for entry in done.entries:
        assert (entry.collapse is not None) == (entry.score > judge.suspicion)
        if entry.collapse is None:
            assert not entry.memorized
            continue
        logs = torch.tensor([entry.score, entry.collapse]).double().log()
        medians, spreads = torch.tensor([judge.second.score_scale, judge.second.collapse_scale]).T
        evidence = ((logs - medians) / spreads).sum().item()
        assert entry.memorized == (evidence > judge.second.threshold)
    sampled = sum(entry.collapse is not None for entry in done.entries)
    assert 0 < sampled < len(done.entries)
    assert done.summary["calibration"]["second_stage"] == {
        "suspicion": judge.second.suspicion, "threshold": judge.second.threshold,
        "sampled": sampled, "controls_sampled": len(judge.second.control_evidence),
    }  # fmt: skip
    for entry in lines(tmp_path / "a"):
        jsonschema.validate(entry, schema("results"))
    jsonschema.validate(json.loads(json.dumps(done.summary)), schema("summary"))
    page = (tmp_path / "a" / "report.html").read_text("utf-8")
    assert "collapse" in page
    assert "--collapse" in page
    before = dict(work)
    assert run_audit(settings).entries == done.entries
    assert work == before  # continued: nothing is sampled again
    plain = dataclasses.replace(
        settings, collapse=False, calibration=None, output=tmp_path / "plain"
    )
    run_audit(plain)
    given = dataclasses.replace(settings, calibration=tmp_path / "plain" / "calibration.json")
    with pytest.raises(CalibrationError, match="calibrate --collapse"):
        run_audit(dataclasses.replace(given, output=tmp_path / "b"))


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
    assert nearest.copied is None  # three prompts and twelve controls are not enough
    assert any("not enough" in caveat for caveat in second.summary["caveats"])
    assert (tmp_path / "b" / nearest.path).is_file()
    controls = tmp_path / "controls.txt"
    controls.write_text("\n".join(captions["held_out"][:45]), encoding="utf-8")
    third = run_audit(dataclasses.replace(first, controls=str(controls), output=tmp_path / "c"))
    verdicts = {e.index: e.images[0].nearest.copied for e in third.entries}
    assert verdicts == {0: None, 1: True, 2: None}  # three images: a copy of any is unknown
    assert third.summary["similarity"]["others_drawn"] == 22
    assert any("22 images of other prompts" in caveat for caveat in third.summary["caveats"])
    before = dict(work)
    run_audit(dataclasses.replace(first, controls=str(controls), output=tmp_path / "c"))
    assert work == before  # continued: nothing is drawn again
    for entry in (*lines(tmp_path / "b"), *lines(tmp_path / "c")):
        jsonschema.validate(entry, schema("results"))
