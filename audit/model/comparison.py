"""Generated images against the training images, where those are known."""

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ... import demo
from ...shared.files.images import ImageFiles, read_image, save_png
from ...shared.files.prompts import PromptSet
from ..common.job import content_key
from ..common.measure import Bars, silent
from ..common.similarity import (
    ALPHA,
    NEIGHBOURS,
    PIXELS,
    SIDE,
    Features,
    Reference,
    calibrate_ratio,
    sscd_features,
)
from ..common.sscd import has_sscd
from .images import Sampled, all_exist
from .result import NearestImage, rate
from .work import Scored, Work

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

COPY_RATE = 0.01
"""Share of images that are no copies but this near to one training image alone."""
SHOWN_SIDE = 256
"""Pixels of the copies of training images that a report shows."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """Training images: small ones to compare with, and how to get a larger one to show."""

    thumbnails: "list[Image]"
    captions: list[str]
    paths: list[Path | None]
    controls: "Sequence[Image]" = ()
    """Images like the training images but not among them."""
    is_demo: bool = False

    def image(self, caption: str) -> "Image | None":
        """Return the training image of a caption in full size; None when it is not known."""
        for other, path in zip(self.captions, self.paths, strict=True):
            if other == caption and path is not None:
                return read_image(path)
        return demo.training_image(caption) if self.is_demo else None

    def save_copy(self, index: int, folder: Path) -> str:
        """Write a training image for the report, and return its path in the folder."""
        name = f"images/training-{index:05d}.png"
        if not (folder / name).is_file():
            image = self.image(self.captions[index]) if self.is_demo else None
            if (path := self.paths[index]) is not None:
                image = read_image(path)
                image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
            save_png(image or self.thumbnails[index], folder / name)
        return name


def known_images(model: str, prompts: PromptSet, bars: Bars) -> Known | None:
    """Return the demo's training images, or those beside the user's captions."""
    if model == demo.NAME:
        from ...demo.data import build_renderings

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

    read = []
    with closing(bars("training images", len(pairs), 0, "image")) as bar:
        for text, path in pairs:
            try:
                read.append((text, path, read_image(path).resize((SIDE, SIDE), Resampling.BOX)))
            except ValueError as error:
                logger.warning("%s It is left out of the comparison.", error)
            bar.update(1)
    return Known(thumbnails=[image for *_, image in read], captions=[text for text, *_ in read],
                 paths=[path for _, path, _ in read])  # fmt: skip


def best_features(known: Known) -> Features:
    """Return SSCD for image files where it is installed, else pixels.

    The demo's training images are small drawings, which pixels tell apart better.
    """
    return sscd_features() if all(known.paths) and has_sscd() else PIXELS


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
        with closing(bars("copies", len(images), 0, "image")) as bar:
            self.reference = Reference(images, features, progress=bar.update)
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


def leave_one_out(reference: Reference) -> float | None:
    """Return the ratio below which only a share `COPY_RATE` of the training images fall.

    Each is compared with all others; exact duplicates count once, or a repeated image would hide
    every copy. None when there are too few to speak about that share.
    """
    rows = torch.unique(reference.rows, dim=0)
    rank = int(COPY_RATE * (len(rows) + 1))
    if rank < 1:
        return None
    count = min(NEIGHBOURS + 1, len(rows))
    ratios = []
    for part in rows.split(256):
        distances = torch.cdist(part, rows).topk(count, largest=False).values[:, 1:]
        ratios.append(distances[:, 0] / (ALPHA * distances.mean(1)).clamp_min(1e-12))
    return torch.cat(ratios).sort().values[rank - 1].item()


def comparer_of(work: Work) -> Comparer | None:
    """Return what compares with the training images; None when fewer than two are known."""
    known = known_images(work.config.model, work.inputs.prompts, work.bars)
    if known is None or len(known.thumbnails) < 2:
        return None
    return Comparer(known, work.job.folder, work.bars)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Which training images the generated ones resemble, as far as those are known."""

    nearest: dict[str, NearestImage]
    """By the generated image's path."""
    summary: dict[str, Any] | None
    """Method, threshold and share of copies; None when no training images are known."""
    caveats: tuple[str, ...] = ()


def compare(work: Work, scored: Scored, plan: Sequence[Sampled]) -> Comparison:
    """Find the training image nearest to every generated one, and which of them are copies.

    Args:
        work: The folder of its job holds the images and gets copies of their neighbours.
        scored: The share of copies is that of the flagged prompts.
        plan: The generated images.
    """
    # Installed or not, SSCD must not be mistaken for pixels by a continued job.
    key = content_key(work.job.key, [asdict(s) for s in plan], has_sscd())
    journal = work.job.journal("similarity")
    stored = journal.get(key)
    if stored is None or not all_exist(work.job.folder, stored["copies"]):
        stored = _compare(work, plan)
        journal.put(key, stored)
    nearest = {path: NearestImage(**values) for path, values in stored["nearest"].items()}
    if not nearest:
        return Comparison(nearest={}, summary=None)
    flagged = [s for s in plan if scored.flags[s.index]]
    copied = [nearest[path].copied for s in flagged for path in s.paths.values()]
    known, threshold = stored["training_images"], stored["threshold"]
    return Comparison(
        nearest=nearest,
        summary={
            "method": stored["method"],
            "training_images": known,
            "threshold": threshold,
            "copies": None if threshold is None else rate(sum(map(bool, copied)), len(copied)),
        },
        caveats=() if threshold is not None else (
            f"{known} training images are not enough controls to say how near a copy is: "
            "similarities are shown, no copies are counted.",
        ),
    )  # fmt: skip


def _compare(work: Work, plan: Sequence[Sampled]) -> dict[str, Any]:
    """Return everything that a continued job must not compute again, as JSON values."""
    comparer = comparer_of(work) if plan else None
    if comparer is None:
        return {"nearest": {}, "copies": [], "threshold": None, "training_images": 0, "method": ""}
    nearest = comparer.nearest([(s.prompt, path) for s in plan for path in s.paths.values()])
    return {
        "nearest": {path: asdict(image) for path, image in nearest.items()},
        "copies": sorted({image.path for image in nearest.values()}),
        "threshold": comparer.threshold,
        "training_images": len(comparer.known.thumbnails),
        "method": comparer.reference.features.name,
    }
