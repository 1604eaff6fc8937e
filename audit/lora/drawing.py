"""Draw the images of an audit, each batch once; a file that stands there is finished."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ...shared.files.storage import replace_atomically
from ..common.subject import Subject
from .asking import Shot
from .attack import sample_attack
from .config import LoraAuditConfig


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images that are sampled at once, so that their digits depend on nothing else."""

    lora: Path
    shots: tuple[Shot, ...]
    """All of one mode."""


class Subjects:
    """The base model under one LoRA file after the other; only the last is held."""

    def __init__(self, config: LoraAuditConfig):
        self.config = config
        self._held: Subject | None = None

    def under(self, lora: Path) -> Subject:
        """Return the base model with a LoRA, not loaded before it is asked to compute."""
        if self._held is None or self._held.lora != lora:
            self._held = None  # two models may not fit
            config = self.config
            self._held = Subject(
                config.model, lora=lora, device=config.device, dtype=config.dtype,
                revision=config.revision, resolution=config.resolution,
                config=config.model_config,
            )  # fmt: skip
        return self._held


def batches(lora: Path, shots: Sequence[Shot], size: int) -> list[Batch]:
    """Cut shots into batches of one mode; the cuts do not depend on what is finished."""
    return [
        Batch(lora=lora, shots=tuple(same[start : start + size]))
        for _, group in groupby(shots, key=lambda shot: shot.mode)
        for same in [list(group)]
        for start in range(0, len(same), size)
    ]


def unfinished(planned: Sequence[Batch], folder: Path) -> list[Batch]:
    """Return the batches of which a file is missing."""
    return [batch for batch in planned
            if not all((folder / shot.path).is_file() for shot in batch.shots)]  # fmt: skip


def draw(subject: Subject, batch: Batch, folder: Path, config: LoraAuditConfig) -> None:
    """Sample a batch and write its images into `folder`, each whole or not at all."""
    denoiser, mode = subject.denoiser, batch.shots[0].mode
    prompts, seeds = [s.prompt for s in batch.shots], [s.seed for s in batch.shots]
    if mode == "attack":
        images = sample_attack(denoiser, prompts, seeds, config.generation_steps)
    else:
        with denoiser.lora_disabled() if mode == "off" else nullcontext():
            images = denoiser.generate(
                prompts, seeds, steps=config.generation_steps, cond_scale=config.cond_scale
            )
    for shot, image in zip(batch.shots, images, strict=True):
        with replace_atomically(folder / shot.path) as part:
            image.save(part, format="PNG")
