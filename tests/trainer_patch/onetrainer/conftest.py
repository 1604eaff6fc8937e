"""Real trainings by OneTrainer on small models, on the CPU.

They need a checkout, whose files stay as they are, and the Python that runs it:

    ONETRAINER_DIR=~/OneTrainer ONETRAINER_PYTHON=~/OneTrainer/venv/bin/python \
        pytest tests/trainer_patch/onetrainer
"""

import json
import subprocess
from pathlib import Path

import pytest
from checkouts import folder_of, make_concept, make_images, python_of
from onetrainer_lora import USUAL, merged
from unmemorize.shared.training.concept.subspace import ConceptSubspace


@pytest.fixture(scope="session")
def checkout() -> Path:
    """OneTrainer's folder; skips where none is given."""
    return folder_of("OneTrainer", "ONETRAINER")


@pytest.fixture(scope="session")
def room(tmp_path_factory) -> Path:
    """A folder with the images and some subspaces."""
    folder = tmp_path_factory.mktemp("onetrainer")
    make_images(folder / "images")
    ConceptSubspace.empty(128).save(folder / "empty.safetensors")
    return folder


@pytest.fixture(scope="session")
def launch(package_env, checkout):
    """Function that runs a script of OneTrainer and returns its exit status."""
    server = subprocess.Popen(
        [
            python_of("ONETRAINER"),
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
    """The concept's subspace."""
    return make_concept(root / "demo" / "model", room / "concept.safetensors")
