"""A training that is watched: what is said at each saved file, and where it ends."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.filter.watch import EVERY, VISITS
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.shared.training.protection import Protection, ProtectionFailed
from unmemorize.shared.training.settings import FilterSettings, ProtectionSettings

IMAGES = 12


def watching(tmp_path, **asked) -> Protection:
    settings = ProtectionSettings(filter=FilterSettings(**asked))
    return Protection(settings, output=tmp_path / "lora")


def epoch(protection: Protection, number: int, louder: float, path) -> None:
    """Visit each image `VISITS` times and save; the LoRA moves half of them `louder` times."""
    draw = torch.Generator().manual_seed(number)
    for _ in range(VISITS):
        for image in range(IMAGES):
            sample = Sample(file=f"secret {image}.png", caption=f"caption {image}")
            due = protection.controls_due([sample])
            loud = louder if image % 2 else 1.0
            base, lora = torch.rand(2, generator=draw) + 0.5
            plain = torch.zeros(1, 4, 2, 2)
            protection.weigh(
                plain + lora * loud, plain, timesteps=torch.tensor([500]), samples=[sample],
                controls=(plain + base, plain) if due.any() else None,
            )  # fmt: skip
    protection.before_save()
    path.touch()
    protection.after_save(path)


def test_it_ends_after_the_last_file_inside_the_controls_interval(tmp_path, caplog):
    protection = watching(tmp_path, stop=True)
    with caplog.at_level(logging.INFO):
        for number, louder in enumerate((1.0, 1.0, 6.0)):
            assert not protection.ends
            epoch(protection, number, louder, tmp_path / f"lora-{number}.safetensors")
            report = json.loads((tmp_path / "lora.memorized.json").read_text("utf-8"))
            assert report["seen"] == (number + 1) * VISITS * IMAGES
    assert "The last saved file inside the controls' interval is lora-1.safetensors" in (
        protection.ends
    )
    assert report["last_inside"] == "lora-1.safetensors"
    assert set(report["memorized_since"]) == {f"secret {n}.png" for n in range(1, IMAGES, 2)}
    last = 2 * VISITS * IMAGES
    assert all(last < call and not call % EVERY for call in report["memorized_since"].values())
    assert "being memorized: secret 1.png" in caplog.text
    assert protection.scalars()["unmemorize/memorized_images"] == IMAGES / 2
    # The LoRA is published, and its header names no file of the user's.
    assert "secret" not in json.dumps(protection.metadata())
    protection.finish()


def test_a_warning_alone_ends_nothing(tmp_path):
    protection = watching(tmp_path, warn=True)
    for number, louder in enumerate((1.0, 6.0)):
        epoch(protection, number, louder, tmp_path / f"lora-{number}.safetensors")
    assert not protection.ends
    protection.finish()


def test_the_first_file_may_be_outside_already(tmp_path):
    protection = watching(tmp_path, stop=True)
    epoch(protection, 0, 6.0, tmp_path / "lora-0.safetensors")
    assert "No saved file is inside" in protection.ends


def test_what_was_to_stop_and_never_was_judged_ends_in_an_error(tmp_path):
    protection = watching(tmp_path, stop=True)
    sample, one = Sample(file="a.png", caption="a"), torch.ones(1, 4, 2, 2)
    protection.weigh(one, 0 * one, timesteps=torch.tensor([5]), samples=[sample],
                     controls=(one, 0 * one))  # fmt: skip
    (tmp_path / "lora.safetensors").touch()
    protection._saved.clear()
    with pytest.raises(ProtectionFailed, match="no verdict on any saved file: 0 of 1 images"):
        protection.finish()


def test_several_processes_are_refused(tmp_path):
    settings = ProtectionSettings(filter=FilterSettings(warn=True))
    with pytest.raises(UnsupportedTraining, match="there are 2 processes"):
        Protection(settings, output=tmp_path / "lora", processes=2)


def test_without_watching_there_are_no_controls(tmp_path):
    protection = watching(tmp_path)
    assert not protection.watches
    assert not protection.controls_due([Sample(file="a.png")]).any()
    assert "unmemorize/memorized_images" not in protection.scalars()


INTERRUPTED = """
import sys, torch
from pathlib import Path
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.protection import Protection
from unmemorize.shared.training.settings import FilterSettings, ProtectionSettings

settings = ProtectionSettings(filter=FilterSettings())
protection = Protection(settings, output=Path(sys.argv[1]) / "lora")
one = torch.ones(1, 4, 2, 2)
protection.weigh(one, 0 * one, timesteps=torch.tensor([5]), samples=[Sample(file="a.png")])
raise KeyboardInterrupt
"""


def test_ctrl_c_keeps_the_ranked_list(tmp_path, package_env):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    done = subprocess.run(command, env=package_env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr
    report = json.loads((tmp_path / "lora.memorized.json").read_text("utf-8"))
    assert [sample["file"] for sample in report["samples"]] == ["a.png"]
