"""The audit of a real LoRA on the demo model: what it finds, and that a stopped one continues."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_audit import HELD_OUT, example_lora, write_drawings, write_others
from typer.testing import CliRunner
from unmemorize.audit.common import subject
from unmemorize.audit.common.measure import SilentBar
from unmemorize.audit.lora import run
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.feature_cache import PLACE
from unmemorize.audit.lora.run import run_lora_audit
from unmemorize.cli import app

pytestmark = pytest.mark.slow
WRITTEN = ("report.html", "audit.json", "model_card.md", "badge.svg", "similarity.npz")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Features and the positive control are kept for this module only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLACE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config(root, tmp_path_factory) -> LoraAuditConfig:
    folder = tmp_path_factory.mktemp("lora")
    return LoraAuditConfig(
        lora=example_lora(root), images=write_drawings(root, folder / "5_drawing"),
        held_out=write_others(folder / "others"), epochs=(example_lora(root),),
        output=folder / "out", images_per_prompt=1, attack_images=3, generation_steps=8,
        device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def audit(config):
    return run_lora_audit(config)


def test_the_drawings_that_come_back_are_named(audit):
    assert audit.positive_control.works, audit.positive_control.detail
    # The colours of the third come back changed.
    assert [v.verdict for v in audit.verdicts[:2]] == ["verbatim"] * 2
    for verdict in audit.verdicts:
        assert verdict.similarity > audit.thresholds.near
        assert verdict.control < audit.thresholds.near
        best = audit.generations[verdict.generation]
        assert best.lora
        assert (best.nearest, best.similarity) == (verdict.image, pytest.approx(verdict.similarity))
    assert audit.headline.given
    assert audit.headline.reproduced.count >= 2
    assert audit.headline.controls.count == 0
    assert audit.headline.controls.total == 3 + HELD_OUT


def test_the_attack_brings_them_out(audit):
    assert audit.attack.generations == 9
    assert audit.attack.extracted.count >= 2
    assert all(clique.size == 3 for clique in audit.attack.cliques)


def test_the_lora_drives_its_captions_harder(audit):
    captions = [score for score in audit.scores if score.asked == "caption"]
    assert len(captions) == 3
    assert all(score.on > 1.5 * score.off for score in captions)
    assert next(score for score in audit.scores if score.asked == "empty").on < 1e-4
    assert [caption for caption, _ in audit.words]


def test_the_published_epoch_is_outside(audit):
    assert len(audit.epochs) == 1
    assert not audit.epochs[0].inside
    assert audit.best_epoch is None
    assert audit.epochs[0].score > 0


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


class Stopped(SilentBar):
    """A bar at which the user presses Ctrl-C."""

    def __init__(self, left: list[int]):
        self.left = left

    def update(self, n: int) -> None:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise KeyboardInterrupt


def test_stopped_in_the_middle_it_ends_with_the_same_bytes(audit, config, tmp_path):
    """Start from a job without its last images, scores and files, and stop once more on the way."""
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    images = sorted(output.glob("images/*.png"))
    for path in images[len(images) - 9 :]:
        path.unlink()
    for name in (*WRITTEN, "journal/words.jsonl"):
        (output / name).unlink()
    scores = output / "journal" / "scores.jsonl"
    scores.write_bytes(scores.read_bytes()[:-40])
    again, left = dataclasses.replace(config, output=output), [6]
    with pytest.raises(KeyboardInterrupt):
        run_lora_audit(again, lambda *_: Stopped(left))
    assert not (output / "report.html").exists()
    run_lora_audit(again)
    assert differing(config.output, output) == []


def differing(first: Path, second: Path) -> list[str]:
    names = [*WRITTEN, *(path.relative_to(first).as_posix() for path in first.rglob("*.png"))]
    return [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()]


def test_a_finished_job_is_not_computed_again(audit, config, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(subject, "load_denoiser", load)
    again = run_lora_audit(config)
    assert again == audit


def test_the_command_answers_with_exit_code_and_json(audit, config, monkeypatch):
    monkeypatch.setattr(run, "run_lora_audit", lambda *args: audit)
    asked = ["audit", "demo", "--lora", str(config.lora), "--images", str(config.images)]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 3
    assert audit.headline.text in told.output.replace("\n", " ")
    assert "verbatim" in told.output
    document = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert document["headline"]["reproduced"]["count"] == audit.headline.reproduced.count


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images", "x"], "--images needs --lora"),
        (["--lora", "x", "--held-out", "y"], "--held-out needs --images"),
        (["--lora", "x", "--images", "y", "--prompts", "z"], "--prompts does not go with --images"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, said):
    told = CliRunner().invoke(app, ["audit", "demo", *options])
    assert told.exit_code == 2
    assert said in " ".join(told.output.split())
