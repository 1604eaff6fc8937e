"""Generated images against the training images, where those are known."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..shared.prompts import PromptSet
from ..shared.storage import replace_atomically
from .config import DEMO, AuditConfig
from .generation import Sampled
from .inputs import Inputs
from .job import Job, content_key
from .measure import Bars
from .result import NearestImage
from .similarity import ALPHA, NEIGHBOURS, SIDE, Reference, calibrate_ratio
from .summary import rate

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

COPY_RATE = 0.01
"""Share of images that are no copies but this near to one training image alone."""
SHOWN_SIDE = 256
"""Pixels of the copies of training images that a report shows."""
METHOD = f"pixels: root mean square difference of {SIDE} x {SIDE} thumbnails"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Where the generated images come from, as far as anybody can tell."""

    nearest: dict[str, NearestImage]
    """By the generated image's path."""
    summary: dict[str, Any] | None
    """Method, threshold and share of copies; None when no training images are known."""
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Known:
    """Training images: small ones to compare with, and how to get a larger one to show."""

    thumbnails: "list[Image]"
    captions: list[str]
    paths: list[Path | None]
    controls: "Sequence[Image]" = ()
    """Images like the training images but not among them."""
    is_demo: bool = False


class Comparer:
    """Finds the training image nearest to a generated one, and says which are copies.

    A copy is nearer to one training image alone than all but `COPY_RATE` of images that are no
    copies: the demo's controls, or else the training images among each other. Without enough of
    them nothing is called a copy.
    """

    def __init__(self, known: Known, folder: Path):
        self.known, self.folder = known, folder
        self.reference = Reference(known.thumbnails)
        self.threshold = (
            calibrate_ratio(self.reference, known.controls, COPY_RATE)
            if known.controls
            else leave_one_out(self.reference)
        )
        """Ratio below which an image is a copy; None when too few images could tell."""

    def training_image(self, prompt: str) -> "Image | None":
        """Return the training image of a caption in full size; None when it is not known."""
        for caption, path in zip(self.known.captions, self.known.paths, strict=True):
            if caption == prompt and path is not None:
                return _read(path)
        from .. import demo

        return demo.training_image(prompt) if self.known.is_demo else None

    def nearest(self, sampled: Sequence[tuple[str, str]]) -> dict[str, NearestImage]:
        """Return the nearest training image by path, for pairs of prompt and path in the folder."""
        hits = self.reference.nearest([_read(self.folder / path) for _, path in sampled])
        captions, threshold = self.known.captions, self.threshold
        return {
            path: NearestImage(
                path=_save_copy(self.known, hit.index, self.folder),
                caption=captions[hit.index],
                similarity=1 - hit.distance,
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
    journal, key = job.journal("similarity"), content_key(job_key, [asdict(s) for s in plan])
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
            "method": METHOD,
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
        return {"nearest": {}, "copies": [], "threshold": None, "training_images": 0}
    comparer = Comparer(known, job.folder)
    nearest = comparer.nearest(
        [(sampled.prompt, sampled.path(seed)) for sampled in plan for seed in sampled.seeds]
    )
    return {
        "nearest": {path: asdict(image) for path, image in nearest.items()},
        "copies": sorted({image.path for image in nearest.values()}),
        "threshold": comparer.threshold,
        "training_images": len(known.thumbnails),
    }


def known_images(model: str, prompts: PromptSet, bars: Bars) -> Known | None:
    """Return the demo's training images, or those beside the user's captions."""
    if model == DEMO:
        from .. import demo
        from ..demo.data import build_renderings

        captions = demo.captions()
        texts = [captions[r.caption].text for r in build_renderings(list(captions))]
        return Known(
            thumbnails=list(demo.training_images()),
            captions=texts,
            paths=[None] * len(texts),
            controls=demo.control_images(),
            is_demo=True,
        )
    pairs = [(text, path) for text, images in zip(prompts.prompts, prompts.images, strict=True)
             for path in images]  # fmt: skip
    if not pairs:
        return None
    from PIL.Image import Resampling

    bar, small = bars("training images", len(pairs), 0, "image"), []
    try:
        for text, path in pairs:
            try:
                small.append((text, path, _read(path).resize((SIDE, SIDE), Resampling.BOX)))
            except ValueError as error:
                logger.warning("%s", error)
            bar.update(1)
    finally:
        bar.close()
    return Known(thumbnails=[image for *_, image in small], captions=[text for text, *_ in small],
                  paths=[path for _, path, _ in small])  # fmt: skip


def _read(path: Path) -> "Image":
    """Return an image file as RGB.

    Raises:
        ValueError: It is none; names it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} is not a readable image and is left out of the comparison ({error})."
        ) from error


def _save_copy(known: Known, index: int, folder: Path) -> str:
    """Write the training image for the report, and return its path in the folder."""
    name = f"images/training-{index:05d}.png"
    if not (folder / name).is_file():
        path = known.paths[index]
        if path is None:
            from .. import demo

            image = demo.training_image(known.captions[index]) or known.thumbnails[index]
        else:
            image = _read(path)
            image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        with replace_atomically(folder / name) as part:
            image.save(part, format="PNG")
    return name
