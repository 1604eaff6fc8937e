"""Generated images against the training images, where those are known."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...shared.files.images import ImageFiles, read_image
from ..common.job import Job, content_key
from ..common.measure import Bars, silent
from ..common.similarity import (
    ALPHA,
    NEIGHBOURS,
    PIXELS,
    Features,
    Reference,
    calibrate_ratio,
    sscd_features,
)
from ..common.sscd import has_sscd
from .config import AuditConfig
from .generation import Sampled
from .inputs import Inputs
from .result import NearestImage
from .summary import rate
from .training_images import Known, known_images

COPY_RATE = 0.01
"""Share of images that are no copies but this near to one training image alone."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Where the generated images come from, as far as anybody can tell."""

    nearest: dict[str, NearestImage]
    """By the generated image's path."""
    summary: dict[str, Any] | None
    """Method, threshold and share of copies; None when no training images are known."""
    caveats: tuple[str, ...] = ()


class Comparer:
    """Finds the training image nearest to a generated one, and says which are copies.

    A copy is nearer to one training image alone than all but `COPY_RATE` of images that are no
    copies: the demo's controls, or else the training images among each other. Without enough of
    them nothing is called a copy.
    """

    def __init__(
        self, known: Known, folder: Path, bars: Bars = silent, features: Features | None = None
    ):
        """Read all training images.

        Args:
            known: The training images.
            folder: Of the job.
            bars: Makes the progress bar.
            features: What images are compared by; None chooses, see `best_features`.
        """
        self.known, self.folder = known, folder
        features = features or best_features(known)
        images = known.thumbnails if features is PIXELS else ImageFiles(known.paths)
        bar = bars("copies", len(images), 0, "image")
        try:
            self.reference = Reference(images, features, progress=bar.update)
        finally:
            bar.close()
        self.threshold = (
            calibrate_ratio(self.reference, known.controls, COPY_RATE)
            if known.controls
            else leave_one_out(self.reference)
        )
        """Ratio below which an image is a copy; None when too few images could tell."""

    def nearest(self, sampled: Sequence[tuple[str, str]]) -> dict[str, NearestImage]:
        """Return the nearest training image by path, for pairs of prompt and path in the folder."""
        hits = self.reference.nearest([read_image(self.folder / path) for _, path in sampled])
        captions, threshold = self.known.captions, self.threshold
        return {
            path: NearestImage(
                path=self.known.save_copy(hit.index, self.folder),
                caption=captions[hit.index],
                similarity=hit.similarity,
                ratio=hit.ratio,
                is_own=captions[hit.index] == prompt,
                copied=None if threshold is None else hit.ratio < threshold,
            )
            for (prompt, path), hit in zip(sampled, hits, strict=True)
        }


def compare(
    config: AuditConfig,
    inputs: Inputs,
    plan: Sequence[Sampled],
    flagged: set[int],
    job: Job,
    job_key: str,
    bars: Bars,
) -> Comparison:
    """Find the training image nearest to every generated one, and which of them are copies.

    Args:
        config: Of the audit.
        inputs: With the training images of the prompts, if any.
        plan: The generated images.
        flagged: Prompts above the threshold; the share of copies is theirs.
        job: Its folder holds the images and gets copies of their neighbours.
        job_key: Stands for model and settings.
        bars: Makes the progress bar.
    """
    # Installed or not, SSCD must not be mistaken for pixels by a continued job.
    key = content_key(job_key, [asdict(s) for s in plan], has_sscd())
    journal = job.journal("similarity")
    stored = journal.get(key)
    if stored is None or not all((job.folder / name).is_file() for name in stored["copies"]):
        stored = _compare(config, inputs, plan, job, bars)
        journal.put(key, stored)
    nearest = {path: NearestImage(**values) for path, values in stored["nearest"].items()}
    if not nearest:
        return Comparison(nearest={}, summary=None)
    owned = [s.path(seed) for s in plan if s.index in flagged for seed in s.seeds]
    copied = [nearest[path].copied for path in owned]
    threshold, caveats = stored["threshold"], ()
    if threshold is None:
        caveats = (
            f"{stored['training_images']} training images are not enough controls to say how near "
            "a copy is: similarities are shown, no copies are counted.",
        )
    return Comparison(
        nearest=nearest,
        summary={
            "method": stored["method"],
            "training_images": stored["training_images"],
            "threshold": threshold,
            "copies": None if threshold is None else rate(sum(map(bool, copied)), len(copied)),
        },
        caveats=caveats,
    )


def leave_one_out(reference: Reference, quantile: float = COPY_RATE) -> float | None:
    """Return the ratio below which only a share `quantile` of the training images fall.

    Each is compared with all others; exact duplicates count once, or a repeated image would hide
    every copy. None when there are too few to speak about `quantile`.
    """
    rows = torch.unique(reference.rows, dim=0)
    rank = int(quantile * (len(rows) + 1))
    if rank < 1:
        return None
    count = min(NEIGHBOURS + 1, len(rows))
    ratios = []
    for part in rows.split(256):
        distances = torch.cdist(part, rows).topk(count, largest=False).values[:, 1:]
        ratios.append(distances[:, 0] / (ALPHA * distances.mean(1)).clamp_min(1e-12))
    return torch.cat(ratios).sort().values[rank - 1].item()


def _compare(
    config: AuditConfig, inputs: Inputs, plan: Sequence[Sampled], job: Job, bars: Bars
) -> dict[str, Any]:
    """Return everything that a continued job must not compute again, as JSON values."""
    known = known_images(config.model, inputs.prompts, bars) if plan else None
    if known is None or len(known.thumbnails) < 2:
        return {"nearest": {}, "copies": [], "threshold": None, "training_images": 0, "method": ""}
    comparer = Comparer(known, job.folder, bars)
    nearest = comparer.nearest(
        [(sampled.prompt, sampled.path(seed)) for sampled in plan for seed in sampled.seeds]
    )
    return {
        "nearest": {path: asdict(image) for path, image in nearest.items()},
        "copies": sorted({image.path for image in nearest.values()}),
        "threshold": comparer.threshold,
        "training_images": len(known.thumbnails),
        "method": comparer.reference.features.name,
    }


def best_features(known: Known) -> Features:
    """Return SSCD for image files where it is installed, else pixels.

    The demo's training images are small drawings, which pixels tell apart better.
    """
    return sscd_features() if all(known.paths) and has_sscd() else PIXELS
