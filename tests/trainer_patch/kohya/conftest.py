"""Real trainings by sd-scripts on the demo model.

They need a checkout, whose scripts stay as they are, and the Python that runs them:

    SD_SCRIPTS_DIR=~/sd-scripts SD_SCRIPTS_PYTHON=~/sd-scripts/venv/bin/python \
        pytest tests/trainer_patch/kohya
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from checkouts import folder_of, make_concept, make_images, python_of
from kohya_lora import USUAL
from unmemorize.shared.training.concept.subspace import ConceptSubspace


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The scripts; skips where none are given."""
    return folder_of("kohya's sd-scripts", "SD_SCRIPTS")


@pytest.fixture(scope="session")
def room(root, tmp_path_factory) -> Path:
    """A folder with the images, and tokenizers where sd-scripts looks for them."""
    folder = tmp_path_factory.mktemp("sd_scripts")
    make_images(folder / "images" / "3_set")
    for name in ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"):
        shutil.copytree(root / "demo" / "model" / "tokenizer", folder / "tokenizers" / name)
    ConceptSubspace.empty(128).save(folder / "empty.safetensors")
    return folder


@pytest.fixture(scope="session")
def train(root, room, package_env, checkout):
    """Function that trains and returns the saved LoRA, or the output of a training that failed."""

    def run(
        name: str, *extra: str, script: str = "train_network.py", door: str = "script",
        fails: bool = False, toml: dict | None = None, **changed,
    ) -> Path | str:  # fmt: skip
        settings = USUAL | changed | {
            "pretrained_model_name_or_path": str(root / "demo" / "model"),
            "train_data_dir": str(room / "images"),
            "tokenizer_cache_dir": str(room / "tokenizers"),
            "output_dir": str(room / name),
        }  # fmt: skip
        if toml is not None:
            path = room / f"{name}.toml"
            lines = (f"{key} = {json.dumps(value)}" for key, value in (settings | toml).items())
            path.write_text("\n".join(lines))
            arguments = ["--config_file", str(path)]
        else:
            given = {key: value for key, value in settings.items() if value is not None}
            arguments = [
                part
                for key, value in given.items()
                for part in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
            ]
        done = subprocess.run(
            [
                python_of("SD_SCRIPTS"),
                str(Path(__file__).with_name("small_sd_scripts.py")),
                door, script, *arguments, *extra,
            ],
            cwd=checkout, capture_output=True, text=True, encoding="utf-8", errors="replace",
            env=package_env | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert (done.returncode != 0) == fails, done.stderr[-3000:]
        return " ".join(done.stderr.split()) if fails else room / name / "lora.safetensors"

    return run


@pytest.fixture(scope="session")
def plain(train) -> Path:
    return train("plain")


@pytest.fixture(scope="session")
def concept(root, room) -> Path:
    """The concept's subspace."""
    return make_concept(root / "demo" / "model", room / "concept.safetensors")
