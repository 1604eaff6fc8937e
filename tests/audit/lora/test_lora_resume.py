"""A small audit of a real LoRA: what it writes, and that a stopped one continues."""

import dataclasses

import numpy as np
import pytest
from small_audit import (
    HELD_OUT,
    WRITTEN,
    example_lora,
    stopped_and_continued,
    write_drawings,
    write_others,
)
from typer.testing import CliRunner
from unmemorize.audit.common import subject
from unmemorize.audit.common.measure import SilentBar
from unmemorize.audit.lora import compare
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.result import PositiveControl, Rate
from unmemorize.audit.lora.run import run_lora_audit
from unmemorize.cli import app
from unmemorize.shared.files.storage import CACHE
from unmemorize.shared.score.config import DetectionConfig


@pytest.fixture(scope="module", autouse=True)
def cheap(tmp_path_factory):
    """Features are kept for this module only; the positive control is taken as passed."""
    passed = PositiveControl(found=Rate.of(9, 9), works=True, detail="Taken as passed.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("cache")))
        patch.setattr(compare, "positive_control", lambda work: passed)
        yield


@pytest.fixture(scope="module")
def config(root, tmp_path_factory) -> LoraAuditConfig:
    folder = tmp_path_factory.mktemp("lora")
    return LoraAuditConfig(
        lora=example_lora(root), images=write_drawings(root, folder / "5_drawing"),
        held_out=write_others(folder / "others"), epochs=(example_lora(root),),
        output=folder / "out", images_per_prompt=1, attack_images=2, generation_steps=1,
        detection=DetectionConfig(seeds=(0,)), device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def audit(config):
    return run_lora_audit(config)


def test_the_matrix_is_what_the_generations_say(audit):
    matrix = np.load(audit.folder / "similarity.npz")["matrix"]
    assert matrix.shape == (len(audit.generations), 3 + HELD_OUT)
    for row, generation in zip(matrix, audit.generations, strict=True):
        assert int(row[:3].argmax()) == generation.nearest
        assert row[:3].max() == pytest.approx(generation.similarity, abs=1e-5)
        assert (audit.folder / generation.path).is_file()
    twins = {(g.prompt, g.seed): g for g in audit.generations if not g.lora}
    for generation in (g for g in audit.generations if g.lora and g.asked != "attack"):
        assert twins[generation.prompt, generation.seed].asked == generation.asked


def test_stopped_in_the_middle_it_ends_with_the_same_bytes(audit, config, tmp_path):
    assert stopped_and_continued(config, tmp_path / "out") == []


def test_a_quick_audit_asks_captions_and_is_the_beginning_of_a_whole_one(audit, config, tmp_path):
    quick = dataclasses.replace(
        config, output=tmp_path / "out", quick=True, images_per_prompt=2, attack_images=0
    )
    said = []
    first = run_lora_audit(quick, notify=said.append)
    assert {g.asked for g in first.generations} == {"caption"}
    assert {g.lora for g in first.generations} == {True, False}
    assert first.epochs == ()
    (sentence,) = first.open
    for kind in ("by rewordings", "by no words", "1 saved epoch"):
        assert kind in sentence
    page = (quick.output / "report.html").read_text("utf-8")
    assert sentence in page
    assert "Each caption had 2 seeds" in page
    assert "is found in 56\u00a0% of cases" in page
    known = [line for line in said if line.startswith("Known so far")]
    assert len(known) == 1  # after one seed of each
    whole = dataclasses.replace(quick, quick=False)
    continued = run_lora_audit(whole)
    straight = run_lora_audit(dataclasses.replace(whole, output=tmp_path / "straight"))
    assert continued.open == ()
    assert continued.generations == straight.generations
    for name in WRITTEN:
        one, other = ((folder / name).read_bytes() for folder in (whole.output, straight.folder))
        assert one == other


def test_stopped_among_the_rewordings_the_page_keeps_what_was_drawn(audit, config, tmp_path):
    output, said = tmp_path / "out", []
    once = dataclasses.replace(config, output=output, batch_size=1, attack_images=0, epochs=())

    class Bar(SilentBar):
        def __init__(self, description, initial):
            self.stop = (
                5 if description == "images" and any("Known" in line for line in said) else 0
            )

        def update(self, n):
            self.stop -= 1
            if self.stop == 0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_lora_audit(
            once, lambda description, total, initial, unit: Bar(description, initial), said.append
        )
    page = (output / "report.html").read_text("utf-8")
    first, last = (line for line in said if line.startswith("Known so far"))
    assert "by rewordings" in first
    assert last.split("Not asked for")[1] != first.split("Not asked for")[1]
    assert "Not all was asked." in page
    assert not (output / "audit.json").exists()
    assert len(list(output.glob("images/*-on.png"))) > len(list(output.glob("images/*-off.png")))
    run_lora_audit(once)
    assert "Not all was asked." not in (output / "report.html").read_text("utf-8")


def test_example_prompts_are_asked_beside_the_images(audit, config, tmp_path):
    path = tmp_path / "examples.txt"
    caption = audit.training.images[0].caption
    path.write_text(f"zorp on the moon\n{caption}\n", encoding="utf-8")
    given = dataclasses.replace(
        config, output=tmp_path / "out", prompts=(path,), epochs=(), attack_images=0
    )
    asked = run_lora_audit(given)
    examples = [(g.prompt, g.lora) for g in asked.generations if g.asked == "example"]
    assert examples == [("zorp on the moon", True), ("zorp on the moon", False)]
    assert "--prompts examples.txt" in dict(asked.settings)["command"]


def test_a_finished_job_is_not_computed_again(audit, config, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(subject, "load_denoiser", load)
    again = run_lora_audit(config)
    assert again == audit


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images", "x"], "--images needs --lora"),
        (["--lora", "x", "--held-out", "y"], "--held-out needs --images"),
        (["--lora", "x", "--images", "y", "--score", "z"], "--score does not go with --images"),
        (["--lora", "x", "--captions", "5"], "--captions needs --images"),
        (["--quick"], "--quick needs --images"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, said):
    told = CliRunner().invoke(app, ["audit", "demo", *options])
    assert told.exit_code == 2
    assert said in " ".join(told.output.split())
