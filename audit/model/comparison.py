"""Generated images against the training images, where those are known."""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import demo
from ...shared.copies.features import PIXELS, SIDE, Features
from ...shared.copies.neighbours import IMAGES, RATE, TrainingImages
from ...shared.files.images import ImageFiles, read_image, save_png
from ...shared.files.prompts import PromptSet
from ...shared.wording import counted
from ..common.copies import OTHERS, Judged, judge
from ..common.job import content_key
from ..common.measure import Bars, silent
from ..common.similarity import sscd_features
from ..common.sscd import has_sscd
from .images import Sampled, all_exist, at_once, draw_others
from .result import NearestImage, rate
from .work import Scored, Work

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

SHOWN_SIDE = 256
"""Pixels of the copies of training images that a report shows."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """Training images: small ones to compare with, and how to get a larger one to show."""

    thumbnails: "list[Image]"
    captions: list[str]
    paths: list[Path | None]
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
    if model in demo.BUNDLED:
        from ...demo.data import build_renderings

        captions = demo.captions()
        texts = [captions[r.caption].text for r in build_renderings(list(captions))]
        return Known(
            thumbnails=list(demo.training_images()),
            captions=texts,
            paths=[None] * len(texts),
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
    """Finds the training image nearest to a generated one, and says which are copies."""

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
        self.features = features or best_features(known)
        images = known.thumbnails if self.features is PIXELS else ImageFiles(known.paths)
        with closing(bars("copies", len(images), 0, "image")) as bar:
            rows = self.features.rows(images, progress=bar.update)
        self.training = TrainingImages(rows, known.captions)
        self.pixels: TrainingImages | None = None
        """Blurred copies, which SSCD takes for others, are seen in pixels as well."""
        if features is None and self.features is not PIXELS:
            self.pixels = TrainingImages(PIXELS.rows(known.thumbnails), known.captions)

    def judge(
        self, sampled: Sequence[tuple[str, str]], training: TrainingImages | None = None
    ) -> Judged:
        """Return the verdicts of generated images, in their order.

        Args:
            sampled: Pairs of prompt and path in the folder, those of other prompts among them.
            training: Others than the known training images.
        """
        images = [read_image(self.folder / path) for _, path in sampled]
        rows = self.features.rows(images)
        prompts = [prompt for prompt, _ in sampled]
        judged = judge(rows, prompts, training or self.training, self.features.bounds)
        if self.pixels is None:
            return judged
        seen = judge(PIXELS.rows(images), prompts, self.pixels, PIXELS.bounds)
        return replace(judged, verdicts=tuple(
            replace(one, copied=True, is_own=other.is_own, index=other.index,
                    distance=float((row - self.training.rows[other.index]).norm()))
            if other.copied and not one.copied else one
            for one, other, row in zip(judged.verdicts, seen.verdicts, rows, strict=True)
        ))  # fmt: skip

    def nearest(
        self, sampled: Sequence[tuple[str, str]], judged: Judged
    ) -> dict[str, NearestImage]:
        """Return the nearest training image by path, of images and their verdicts."""
        return {
            path: NearestImage(
                path=self.known.save_copy(verdict.index, self.folder),
                caption=self.known.captions[verdict.index],
                similarity=self.features.similarity(verdict.distance),
                ratio=verdict.ratio, own_ratio=verdict.own_ratio, is_own=verdict.is_own,
                copied=verdict.copied,
            )
            for (_, path), verdict in zip(sampled, judged.verdicts, strict=False)
        }  # fmt: skip


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
    judged: tuple[tuple[str, str], ...] = ()
    """Prompt and path of all images that were judged together: each other's yardstick."""
    caveats: tuple[str, ...] = ()

    def own_copied(self, plan: Sequence[Sampled]) -> set[int]:
        """Return the prompts of which an image is a copy of their own training image."""
        return {
            sampled.index for sampled in plan for path in sampled.paths.values()
            if (image := self.nearest.get(path)) and image.is_own and image.copied
        }  # fmt: skip


def compare(
    work: Work, scored: Scored, plan: Sequence[Sampled], comparer: Callable[[], Comparer | None]
) -> Comparison:
    """Find the training image nearest to every generated one, and which of them are copies.

    Args:
        work: The folder of its job holds the images and gets copies of their neighbours.
        scored: The share of copies is that of the flagged prompts.
        plan: The generated images.
        comparer: Returns what compares; not called when the job knows the answer.
    """
    # Installed or not, SSCD must not be mistaken for pixels by a continued job.
    key = content_key(work.job.key, [asdict(s) for s in plan], has_sscd())
    journal = work.job.journal("similarity")
    stored = journal.get(key)
    if stored is None or not all_exist(work.job.folder, stored["copies"]):
        stored = _compare(work, plan, comparer() if plan else None, at_once(scored.facts))
        journal.put(key, stored)
    nearest = {path: NearestImage(**values) for path, values in stored["nearest"].items()}
    if not nearest:
        return Comparison(nearest={}, summary=None)
    flagged = [s for s in plan if scored.flags[s.index]]
    copied = [nearest[path].copied for s in flagged for path in s.paths.values()]
    told = [value for value in copied if value is not None]
    untold = sum(image.copied is None for image in nearest.values())
    return Comparison(
        nearest=nearest,
        summary=stored["summary"] | {"copies": rate(sum(told), len(told))},
        judged=tuple((prompt, path) for prompt, path in stored["judged"]),
        caveats=(*stored["caveats"], *_unknown(untold, len(nearest))),
    )


def _unknown(untold: int, images: int) -> list[str]:
    if not untold:
        return []
    return [
        f"There was not enough to say whether {untold} of {counted(images, 'image', 'images')} are "
        f"copies: it takes images of {OTHERS} other prompts, and {IMAGES} training images where a "
        "prompt has none of its own. They are not counted."
    ]  # fmt: skip


def _compare(
    work: Work, plan: Sequence[Sampled], comparer: Comparer | None, together: int
) -> dict[str, Any]:
    """Return everything that a continued job must not compute again, as JSON values."""
    if comparer is None:
        return {"nearest": {}, "copies": [], "judged": [], "summary": None, "caveats": []}
    pairs = [(s.prompt, path) for s in plan for path in s.paths.values()]
    others, caveats = draw_others(work, [s.prompt for s in plan], together)
    judged = comparer.judge([*pairs, *others])
    nearest = comparer.nearest(pairs, judged)
    return {
        "nearest": {path: asdict(image) for path, image in nearest.items()},
        "copies": sorted({image.path for image in nearest.values()}),
        "judged": [*pairs, *others],
        "summary": {
            "method": comparer.features.name + ("; or in pixels" if comparer.pixels else ""),
            "training_images": len(comparer.known.thumbnails),
            "threshold": judged.limit,
            "own_threshold": comparer.features.bounds.own_factor,
            "false_positive_rate": RATE,
            "dimension": judged.dimension,
            "others_drawn": len(others),
        },
        "caveats": caveats,
    }
