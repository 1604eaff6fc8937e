"""A small audit of a real LoRA: what it writes, and that a stopped one continues."""

import numpy as np
import pytest
from small_audit import (
    HELD_OUT,
    example_lora,
    stopped_and_continued,
    write_drawings,
    write_others,
)
from typer.testing import CliRunner
from unmemorize.audit.common import subject
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
        (["--lora", "x", "--images", "y", "--prompts", "z"], "--prompts does not go with --images"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, said):
    told = CliRunner().invoke(app, ["audit", "demo", *options])
    assert told.exit_code == 2
    assert said in " ".join(told.output.split())
