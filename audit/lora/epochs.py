"""Which saved epoch to publish: how score and reproduced images grow while a LoRA is trained."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...shared.arrays import Float, Tensor
from ...shared.files.weights import sha256_of
from .asking import Shot, chosen_images
from .config import LoraAuditConfig
from .drawing import Batch, batches
from .header import read_header
from .result import EpochPoint, Thresholds, TrainingSet
from .verdicts import LEVEL, fisher, rate


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One saved file."""

    path: Path
    number: int
    sha256: str


def read_epochs(named: Sequence[Path]) -> list[Epoch]:
    """Return the LoRA files that were named, or lie in the named folders, by rising epoch.

    The number stands in the header (`ss_epoch`), else at the end of the name; a file with neither
    is taken for the last, as kohya's scripts name their final one.

    Raises:
        ValueError: There is no such file, or a folder holds none.
    """
    paths: list[Path] = []
    for path in named:
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found or not all(each.is_file() for each in found):
            raise ValueError(f"--epochs: {path} is no .safetensors file and no folder of them.")
        paths += found
    paths = list(dict.fromkeys(path.resolve() for path in paths))
    numbers = {path: _number(path) for path in paths}
    last = 1 + max((n for n in numbers.values() if n is not None), default=0)
    ordered = sorted(paths, key=lambda path: (numbers[path] or last, path.name))
    return [Epoch(path=path, number=numbers[path] or last, sha256=sha256_of([path], path.parent))
            for path in ordered]  # fmt: skip


def _number(path: Path) -> int | None:
    written = read_header(path).epoch
    digits = re.search(r"(\d+)$", path.stem)
    return written if written is not None else int(digits[1]) if digits else None


def epoch_batches(
    epochs: Sequence[Epoch], training: TrainingSet, config: LoraAuditConfig
) -> list[list[Batch]]:
    """Return per epoch what is drawn with it: every caption once."""
    chosen = chosen_images(training, config.captions)
    return [
        batches(
            epoch.path,
            [Shot(prompt=training.images[i].caption, asked="caption", source=i, seed=place,
                  mode="on", path=f"images/epoch-{number:03d}/{i:05d}-on.png")
             for place, i in enumerate(chosen)],
            config.batch_size,
        )
        for number, epoch in enumerate(epochs)
    ]  # fmt: skip


def judge_epoch(
    epoch: Epoch,
    best: Float[Tensor, " image"],
    control: Float[Tensor, " image"],
    limits: Thresholds,
    score: float,
) -> EpochPoint:
    """Return the point of one epoch.

    It is inside when no more images come back verbatim than controls do, and when the images that
    are nearer than `near` are no more than chance makes of the controls (Fisher's exact test).

    Args:
        epoch: The file.
        best: Per training image, its most similar generation of this epoch.
        control: The same without a LoRA.
        limits: Of the audit.
        score: Mean LoRA-on minus LoRA-off score of the captions.
    """
    if limits.near is None or limits.verbatim is None:
        copies, inside = 0, False
    else:
        copies = int((best > limits.verbatim).sum())
        beyond, likely = (int((each > limits.near).sum()) for each in (best, control))
        inside = copies <= int((control > limits.verbatim).sum()) and (
            fisher(beyond, len(best), likely, len(control)) >= LEVEL
        )
    return EpochPoint(
        name=epoch.path.name,
        epoch=epoch.number,
        score=score,
        similarity=float(best.mean()),
        reproduced=rate(copies, len(best)),
        inside=inside,
    )


def best_epoch(points: Sequence[EpochPoint]) -> int | None:
    """Return the position of the last epoch before any that is outside; None when the first is."""
    outside = next((i for i, point in enumerate(points) if not point.inside), len(points))
    return outside - 1 if outside else None
