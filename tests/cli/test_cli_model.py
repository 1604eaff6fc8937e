"""The options that name a model reach it, whichever command they are given to."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner
from unmemorize import cli
from unmemorize.audit.common.subject import Subject

GIVEN = {
    "model": "some/model", "lora": Path("my lora.safetensors"), "strength": 0.6, "device": "cuda:1",
    "dtype": "bfloat16", "revision": "refs/pr/1", "resolution": 64, "frames": 9,
    "config": Path("sd 15"), "offload": "model", "quantize": "nf4",
}  # fmt: skip


@pytest.mark.parametrize("command", ["detect", "explain", "calibrate"])
def test_options_of_the_model_reach_the_model(command, monkeypatch):
    made = []

    def keep(self, model, **options):
        made.append({"model": model, **options})
        raise typer.Exit

    monkeypatch.setattr(Subject, "__init__", keep)
    options = {"model_config" if name == "config" else name: v for name, v in GIVEN.items()}
    model = options.pop("model")
    words = [word for name, value in options.items()
             for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
    done = CliRunner().invoke(cli.app, [command, model, *words])
    assert done.exit_code == 0, done.output
    assert made == [GIVEN]


@pytest.mark.parametrize("command", ["detect", "explain", "calibrate", "mitigate", "audit"])
def test_a_strength_is_that_of_a_lora(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, [command, "demo", "--strength", "0.5"])
    assert done.exit_code not in (0, 3)
    assert "`strength` is that of a LoRA, got 0.5 and no LoRA" in " ".join(done.output.split())
