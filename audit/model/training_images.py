"""The training images that are known: the demo's, or those beside the user's captions."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ... import demo
from ...shared.files.images import read_image
from ...shared.files.prompts import PromptSet
from ...shared.files.storage import replace_atomically
from ..common.measure import Bars
from ..common.similarity import SIDE

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
    controls: "Sequence[Image]" = ()
    """Images like the training images but not among them."""
    is_demo: bool = False

    def image(self, caption: str) -> "Image | None":
        """Return the training image of a caption in full size; None when it is not known."""
        for one, path in zip(self.captions, self.paths, strict=True):
            if one == caption and path is not None:
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
            with replace_atomically(folder / name) as part:
                (image or self.thumbnails[index]).save(part, format="PNG")
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

    bar, small = bars("training images", len(pairs), 0, "image"), []
    try:
        for text, path in pairs:
            try:
                small.append((text, path, read_image(path).resize((SIDE, SIDE), Resampling.BOX)))
            except ValueError as error:
                logger.warning("%s", error)
            bar.update(1)
    finally:
        bar.close()
    return Known(thumbnails=[image for *_, image in small], captions=[text for text, *_ in small],
                  paths=[path for _, path, _ in small])  # fmt: skip
