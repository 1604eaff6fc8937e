"""LoRAs of the demo model, trained on a folder to a known degree."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_lora import add_lora, annealed, draw, encoded, held_out, train
from safetensors.torch import save_file
from tqdm.auto import tqdm
from unmemorize.demo import data
from unmemorize.shared.models.adapter import PipelineDenoiser

WORD = "zorp"
"""The trigger."""
RANK = 32
DROPPED = 10
"""One visit in so many is trained with the empty caption, as trainers do."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """How far a LoRA is trained."""

    name: str
    planted: int
    """Repeats of the planted images in an epoch; the others are shown once."""
    steps: int


LEVELS = (
    Level(name="none", planted=1, steps=60),
    Level(name="some", planted=15, steps=250),
    Level(name="verbatim", planted=15, steps=1200),
)


@dataclass(frozen=True, kw_only=True)
class Sets:
    """Captions with drawings: trained on, and by another vendor, never seen."""

    captions: tuple[data.Caption, ...]
    """The first `planted` of them are shown more often."""
    planted: int
    seed: int
    """Of choice and drawings."""

    def drawing(self, place: int, *, other: bool = False):
        """Return the drawing of a caption; `other` is another vendor's on another ground."""
        return draw(self.captions[place], 100 * self.seed + place + (1_000_001 if other else 0))

    def text(self, place: int) -> str:
        return f"{WORD}, {self.captions[place].text}"

    def write(self, folder: Path, places: Sequence[int], *, other: bool = False) -> Path:
        """Write drawings with their captions, unless they stand there."""
        folder.mkdir(parents=True, exist_ok=True)
        for place in places:
            self.drawing(place, other=other).save(folder / f"{place:03d}.png")
            (folder / f"{place:03d}.txt").write_text(self.text(place), encoding="utf-8")
        return folder


def choose(count: int, planted: int, seed: int) -> Sets:
    """Return `count` captions that the demo model never saw, another choice for each seed."""
    captions = held_out(10_000)
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = tuple(captions[place] for place in order[:count])
    return Sets(captions=chosen, planted=planted, seed=seed)


def train_lora(
    denoiser: PipelineDenoiser, sets: Sets, level: Level, path: Path, *, seed: int
) -> Path:
    """Train a LoRA on the first drawings and save it in kohya's dialect, unless it stands there."""
    if path.is_file():
        return path
    shown = [place for place in range(len(sets.captions))
             for _ in range(level.planted if place < sets.planted else 1)]  # fmt: skip
    drawings = {place: sets.drawing(place) for place in set(shown)}
    visits = [(drawings[place], "" if number % DROPPED == 0 else sets.text(place))
              for number, place in enumerate(shown * DROPPED, 1)]  # fmt: skip
    unet = add_lora(denoiser, seed, RANK)
    steps = train(denoiser, encoded(denoiser, visits), steps=level.steps, seed=seed)
    for number, (optimizer, _) in enumerate(tqdm(steps, path.stem, level.steps)):
        annealed(optimizer, number, level.steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(kohya(unet), part, {"ss_epoch": "1", "ss_steps": str(level.steps)})
    part.replace(path)
    return path


def kohya(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the factors by the names that every host of LoRAs reads."""
    from peft.utils import get_peft_model_state_dict

    weights = {}
    for name, factor in get_peft_model_state_dict(unet).items():
        module, _, letter = name.removesuffix(".weight").rpartition(".lora_")
        module, end = f"lora_unet_{module.replace('.', '_')}", {"A": "down", "B": "up"}[letter]
        weights[f"{module}.lora_{end}.weight"] = factor.detach().half().contiguous()
        if letter == "A":
            weights[f"{module}.alpha"] = torch.tensor(float(len(factor)))
    return weights
