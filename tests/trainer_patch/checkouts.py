"""What tests share that train the demo model with a trainer from a checkout of its own."""

import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.training.concept.concept import parse_concepts
from unmemorize.shared.training.concept.fitting import fit_subspace
from unmemorize.shared.training.concept.text_states import text_path_of

CAPTIONS = ("postage stamp, sushi", "playing card, foggy", "a red house", "museum poster, tram")
CONCEPT = "sushi, sushi roll -> bread"


def folder_of(trainer: str, name: str) -> Path:
    """Return the folder that `<NAME>_DIR` gives; skips where it is not set."""
    if f"{name}_DIR" not in os.environ:
        pytest.skip(
            f"needs {trainer}: set {name}_DIR to its folder, and {name}_PYTHON to the Python that "
            "runs it"
        )
    return Path(os.environ[f"{name}_DIR"]).expanduser().resolve()


def python_of(name: str) -> str:
    """Return the Python that runs the trainer."""
    return os.environ.get(f"{name}_PYTHON", sys.executable)


def can_learn(key: str) -> bool:
    """Return whether a layer has a gradient in a training on `make_images`.

    At 64 pixels the middle of the network holds one place, which has but itself to attend to.
    """
    return "mid_block" not in key or ("attn1_to_q" not in key and "attn1_to_k" not in key)


def make_images(folder: Path) -> None:
    """Make a training folder of noise, a caption beside each picture."""
    folder.mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS):
        pixels = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)


def make_concept(model: Path, path: Path) -> Path:
    """Save the concept's subspace, by the model's text path in diffusers and not in the trainer."""
    text_path = text_path_of(load_denoiser(model))
    fit_subspace(text_path, parse_concepts(CONCEPT), CAPTIONS, force=True).save(path)
    return path
