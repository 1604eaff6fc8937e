"""What cannot be protected is refused before the first step; what was not done is not passed."""

import pytest
import torch
from diffusers_runs import SCRIPT, run
from unmemorize.shared.patching import HookMissing
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.shared.training.projection.projection import Projection
from unmemorize.shared.training.protection import ProtectionFailed
from unmemorize.trainer_patch.options import OptionError


@pytest.fixture
def refused(images, tmp_path, monkeypatch):
    """Function that returns why a training is refused; no step may have been done."""

    def step(*_, **__):
        pytest.fail("a step was done")

    def reason(*arguments, error=UnsupportedTraining):
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(error) as caught:
            run(tmp_path / "out", ["--train_data_dir", str(images), *arguments])
        return str(caught.value)

    return reason


@pytest.mark.parametrize("method", ["mem_filter", "project_concepts"])
def test_trained_text_encoder(refused, subspace, method):
    value = {"mem_filter": "inf", "project_concepts": str(subspace)}[method]
    assert "--train_text_encoder" in refused(f"--{method}", value, "--train_text_encoder")


def test_dora(refused, subspace):
    assert "DoRA" in refused("--project_concepts", str(subspace), "--use_dora")


def test_lora_that_reads_no_text(refused, subspace):
    reason = refused("--project_concepts", str(subspace), "--lora_layers", "ff.net.0.proj")
    assert "No LoRA reads the text" in reason


def test_option_that_cannot_be_understood(refused):
    assert "--mem_filter" in refused("--mem_filter", "much", error=OptionError)


def test_script_that_never_steps(images, tmp_path, subspace):
    with pytest.raises(ProtectionFailed, match="No optimizer step"):
        run(tmp_path / "out", ["--train_data_dir", str(images), "--never_step",
                               "--project_concepts", str(subspace)])  # fmt: skip


def test_projection_that_does_nothing(images, tmp_path, subspace, monkeypatch):
    monkeypatch.setattr(Projection, "project_weights", lambda self: None)
    with pytest.raises(RuntimeError, match="reach into the prohibited subspace"):
        run(tmp_path / "out", ["--train_data_dir", str(images),
                               "--project_concepts", str(subspace)])  # fmt: skip


def test_script_without_a_lora(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.read_text("utf-8").split("    accelerator = ")[0] + "\n\nmain()\n", "utf-8"
    )
    given = ["--train_data_dir", str(tmp_path), "--mem_filter", "inf"]
    with pytest.raises(HookMissing, match="never gave a LoRA"):
        run(tmp_path / "out", given, script=script)
    run(tmp_path / "out", given[:2], script=script)  # nothing was asked for: nothing is missing


def test_hooks_are_taken_off_again(images, tmp_path):
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderShard
    from diffusers.loaders.lora_base import LoraBaseMixin
    from diffusers.loaders.peft import PeftAdapterMixin

    owners = (Accelerator, DataLoaderShard, LoraBaseMixin, PeftAdapterMixin)
    before = [dict(vars(owner)) for owner in owners]
    with pytest.raises(OptionError):
        run(tmp_path / "out", ["--train_data_dir", str(images), "--mem_filter", "x"])
    assert [dict(vars(owner)) for owner in owners] == before


def test_missing_script(monkeypatch):
    with pytest.raises(SystemExit, match="examples/text_to_image"):
        run(SCRIPT.parent, [], script=SCRIPT.with_name("gone.py"))


def test_help_works_without_a_script(run_python):
    done = run_python("-m", "unmemorize.trainer_patch.diffusers", "--help")
    assert "--project_concepts" in done.stdout
    assert "--mem_filter" in done.stdout
