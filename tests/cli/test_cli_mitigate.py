"""Options of `unmemorize mitigate` reach the job."""

from pathlib import Path

import pytest
from typer.testing import CliRunner
from unmemorize.audit.model import mitigation
from unmemorize.cli import app


@pytest.fixture
def asked(monkeypatch):
    """Return what runs the command and gives the settings of its job."""

    def run(*arguments: str):
        seen = []

        def job(config, bars):
            seen.append(config)
            raise ValueError("far enough")

        monkeypatch.setattr(mitigation, "run_mitigation", job)
        result = CliRunner().invoke(app, ["mitigate", *arguments])
        assert result.exit_code == 1, result.output
        (config,) = seen
        return config

    return run


def test_guidance_and_training_images(asked):
    config = asked(
        "demo", "--guidance-scale", "3.5", "--training", "images", "--method", "neighbour"
    )
    assert config.audit.detection.cond_scale == 3.5
    assert config.training == Path("images")
    assert config.methods == ("neighbour",)
    usual = asked("demo")
    assert usual.audit.detection.cond_scale == 7.5
    assert usual.training is None
    assert usual.methods == ()
