"""The audit of a real LoRA on the demo model: what it finds, and what the command answers."""

import json

import pytest
from small_audit import (
    HELD_OUT,
    example_lora,
    stopped_and_continued,
    write_drawings,
    write_others,
)
from typer.testing import CliRunner
from unmemorize.audit.lora import run
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.run import run_lora_audit
from unmemorize.cli import app
from unmemorize.shared.files.storage import CACHE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Features and the positive control are kept for this module only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("cache")))
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
        assert verdict.similarity > verdict.control
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


def test_stopped_in_the_middle_it_ends_with_the_same_bytes(audit, config, tmp_path):
    """With words that were explained, too: a quicker audit finds none to explain."""
    assert audit.words
    assert stopped_and_continued(config, tmp_path / "out") == []


def test_the_command_answers_with_exit_code_and_json(audit, config, monkeypatch):
    monkeypatch.setattr(run, "run_lora_audit", lambda *args: audit)
    asked = ["audit", "demo", "--lora", str(config.lora), "--images", str(config.images)]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 3
    assert audit.headline.text in told.output.replace("\n", " ")
    assert "verbatim" in told.output
    document = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert document["headline"]["reproduced"]["count"] == audit.headline.reproduced.count
