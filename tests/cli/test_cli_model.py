"""The options that name a model reach it, whichever command they are given to."""

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner
from unmemorize import cli
from unmemorize.audit.common.subject import Subject
from unmemorize.cli.common.terminal import explain_error

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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["detect", "--force"], "--force needs --calibration"),
        (["mitigate", "--force"], "--force needs --calibration"),
        (["audit", "--force"], "--force needs --calibration"),
        (["audit", "--calibration", "c.json", "--score", "magnitude"],
         "--score does not go with --calibration"),
        (["audit", "--calibration", "c.json", "--false-positive-rate", "0.1"],
         "--false-positive-rate does not go with --calibration"),
        (["mitigate", "--calibration", "c.json", "--controls", "art"],
         "--controls does not go with --calibration"),
    ],
)  # fmt: skip
def test_what_a_calibration_has_decided_is_not_asked_for_beside_it(words, says):
    done = CliRunner().invoke(cli.app, [words[0], "demo", *words[1:]])
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())


def test_a_processor_without_memory_says_so():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert explain_error(error.value).startswith("Not enough memory: ")
