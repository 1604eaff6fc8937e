"""Real trainings by OneTrainer on small models, on the CPU.

They need a checkout, whose files stay as they are, and the Python that runs it:

    ONETRAINER_DIR=~/OneTrainer ONETRAINER_PYTHON=~/OneTrainer/venv/bin/python \
        pytest tests/trainer_patch/onetrainer
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from onetrainer_lora import CAPTIONS, CONCEPT, USUAL, merged
from PIL import Image
from unmemorize.shared.training.fitting import fit_subspace
from unmemorize.shared.training.subspace import ConceptSubspace
from unmemorize.shared.training.text_states import text_path_of
from unmemorize.trainer_patch.options import parse_concepts


@pytest.fixture(scope="session")
def checkout() -> Path:
    """OneTrainer's folder; skips where none is given."""
    if "ONETRAINER_DIR" not in os.environ:
        pytest.skip(
            "needs OneTrainer: set ONETRAINER_DIR to its folder, and ONETRAINER_PYTHON to the "
            "Python that runs it"
        )
    return Path(os.environ["ONETRAINER_DIR"])


@pytest.fixture(scope="session")
def room(tmp_path_factory) -> Path:
    """A folder with the images and some subspaces."""
    folder = tmp_path_factory.mktemp("onetrainer")
    (folder / "images").mkdir()
    for number, caption in enumerate(CAPTIONS):
        pixels = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(number))
        image = folder / "images" / f"{number}.png"
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(image)
        image.with_suffix(".txt").write_text(caption)
    ConceptSubspace.empty(128).save(folder / "empty.safetensors")
    return folder


@pytest.fixture(scope="session")
def launch(package_env, checkout):
    """Function that runs a script of OneTrainer and returns its exit status."""
    server = subprocess.Popen(
        [
            os.environ.get("ONETRAINER_PYTHON", sys.executable),
            str(Path(__file__).with_name("onetrainer_server.py")),
        ],
        cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=package_env | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip

    def run(*job: str) -> int:
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        while not (answer := server.stdout.readline().strip()).lstrip("-").isdigit():
            assert answer or server.poll() is None, "OneTrainer cannot be imported"
        return int(answer)

    with server:
        yield run
        server.stdin.close()


@pytest.fixture(scope="session")
def train(root, room, launch):
    """Function that trains and returns the saved LoRA, or the output of a training that failed."""

    def run(
        name: str, *options: str, door: bool = True, fails: bool = False, **changed,
    ) -> Path | str:  # fmt: skip
        lora, said = room / name / "lora.safetensors", room / f"{name}.log"
        concept = {"__version": 2, "name": "set", "path": str(room / "images"), "seed": 1}
        config = merged(USUAL, {
            "base_model_name": str(root / "demo" / "model"), "workspace_dir": str(room / name),
            "cache_dir": str(room / name / "cache"), "concepts": [concept],
            "output_model_destination": str(lora),
        })  # fmt: skip
        path = room / f"{name}.json"
        path.write_text(json.dumps(merged(config, changed)))
        way = "door" if door else "script"
        status = launch(str(said), way, "scripts/train.py", "--config-path", str(path), *options)
        log = said.read_text("utf-8", errors="replace")
        assert (status != 0) == fails, log[-3000:]
        return " ".join(log.split()) if fails else lora

    return run


@pytest.fixture(scope="session")
def plain(train) -> Path:
    return train("plain", door=False)


@pytest.fixture(scope="session")
def concept(root, room) -> Path:
    """The concept's subspace, by the demo model's text path in diffusers, not in OneTrainer."""
    from unmemorize.shared.models import load_denoiser

    path = room / "concept.safetensors"
    text_path = text_path_of(load_denoiser(root / "demo" / "model"))
    fit_subspace(text_path, parse_concepts(CONCEPT), CAPTIONS, force=True).save(path)
    return path
