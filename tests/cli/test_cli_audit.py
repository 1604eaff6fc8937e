"""The command line of an audit: each option is a setting, and the report names what moved a result.

Everything is read off the command itself, so that an option or setting added later is asked for.
"""

import dataclasses
import inspect
import shlex
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
import typer
from fake_result import make_result
from typer.models import ArgumentInfo
from typer.testing import CliRunner
from unmemorize import cli
from unmemorize.audit.model import report, run
from unmemorize.audit.model.config import AuditConfig
from unmemorize.cli.audit import OfLora
from unmemorize.cli.audit import audit as command
from unmemorize.cli.concept.audit import OfConcept

PARAMETERS = {
    name: parameter
    for name, parameter in inspect.signature(command).parameters.items()
    if name
    not in {
        "images",
        "frames",  # refused: what is audited are images
        *(field.name for kind in (OfLora, OfConcept) for field in dataclasses.fields(kind)),
    }  # they ask for the audit of a LoRA instead
}
CHANGE_NO_RESULT = {"output", "overwrite", "device", "batch_size", "offload", "as_json", "debug"}
"""Need not be given again to get the same page."""
GO_WITH = {"strength": ["--lora", "my.safetensors"], "force": ["--calibration", "my file.txt"]}
"""What an option is refused without."""
OF_CALIBRATION = {"calibration", "force"}
MAKE_ONE = {"controls", "score", "false_positive_rate"}
"""Refused beside a calibration."""


def innermost(kind: Any) -> type:
    """Return the type without `Optional` and `list`."""
    inner = [part for part in get_args(kind) if part is not NoneType]
    return innermost(inner[0]) if inner else kind


def changed(name: str) -> list[str]:
    """Return words of the command line that give one parameter another value than its default."""
    kind, info = get_args(PARAMETERS[name].annotation)
    kind, default = innermost(kind), PARAMETERS[name].default
    value = {
        int: lambda: max(default or 0, info.min or 0) + 1,
        float: lambda: default * 2,
        Path: lambda: "my file.txt",
        str: lambda: "magnitude" if name == "score" else "word",
        bool: lambda: None,
    }[kind]()  # fmt: skip
    words = [] if value is None else [str(value)]
    if isinstance(info, ArgumentInfo):
        return words
    # In an annotation, typer.Option takes the first name in the place of the default.
    given = [n for n in (info.default, *(info.param_decls or ())) if str(n).startswith("--")]
    return [*(given or [f"--{name.replace('_', '-')}"])[:1], *words]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return make_result(tmp_path_factory.mktemp("audit"))


@pytest.fixture
def configured(monkeypatch):
    """Function that returns the settings the command makes of its words."""

    def configured(*words: str) -> AuditConfig:
        made = []

        def keep(config: AuditConfig, *_: Any) -> None:
            made.append(config)
            raise typer.Exit

        monkeypatch.setattr(run, "run_audit", keep)
        done = CliRunner().invoke(cli.app, ["audit", *words])
        assert done.exit_code == 0, done.output
        return made[0]

    return configured


def named(result, config: AuditConfig) -> list[str]:
    """Return the words after `unmemorize audit` in the report."""
    lora = config.lora.name if config.lora else None
    model = dataclasses.replace(result.model, name=Path(config.model).name, lora=lora)
    words = shlex.split(report.reproduce(dataclasses.replace(result, config=config, model=model)))
    assert words[:2] == ["unmemorize", "audit"]
    return words[2:]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_report_names_every_option_that_can_move_a_result(name, configured, result):
    words, needed = changed(name), GO_WITH.get(name, [])
    expected = [] if name in CHANGE_NO_RESULT else words
    given = named(result, configured(*words, *needed))
    assert sorted(given) == sorted([*expected, *needed])


def test_what_changes_no_result_are_options():
    assert set(PARAMETERS) >= CHANGE_NO_RESULT


def test_the_command_of_the_report_makes_the_same_settings(configured, result):
    for left_out in (OF_CALIBRATION, MAKE_ONE):
        given = PARAMETERS.keys() - CHANGE_NO_RESULT - left_out
        config = configured(*(word for name in sorted(given) for word in changed(name)))
        assert configured(*named(result, config)) == config != configured()


def test_frames_are_refused(configured):
    done = CliRunner().invoke(cli.app, ["audit", "--frames", "9"])
    assert done.exit_code == 2
    assert "unmemorize detect" in done.output


def test_every_setting_has_an_option(configured):
    default, reached = configured(), set()
    for name in PARAMETERS:
        config = configured(*changed(name), *GO_WITH.get(name, []))
        reached |= {
            field.name
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(default, field.name)
        }
    assert reached == {field.name for field in dataclasses.fields(AuditConfig)}


def test_command_names_files_without_their_folders(result, tmp_path):
    path = tmp_path / "my captions.txt"
    config = dataclasses.replace(
        result.config, model="m", prompts=(path,), controls=str(path), calibration=path,
        model_config=path, revision="refs/pr/1", false_positive_rate=0.05,
    )  # fmt: skip
    command = report.reproduce(dataclasses.replace(result, config=config))
    assert str(tmp_path) not in command
    for option in ("prompts", "controls", "calibration", "model-config"):
        assert f"--{option} 'my captions.txt'" in command
    assert "--revision refs/pr/1" in command
    assert "--false-positive-rate 0.05" in command
