"""Small copies of pictures for the page; training images only where their owner wants them."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.pages import data_uri
from ..common.training_images import read_image
from .result import LoraAudit
from .training_set import path_of

if TYPE_CHECKING:
    from PIL.Image import Image

LARGE, SMALL = 320, 144
"""Pixels of the longer side: of pictures to compare, and of those that only help to find them."""
BLURRED = 8
"""Pixels of the longer side that are left of a picture that is not to be shown."""


class Thumbnails:
    """Pictures of an audit as data URIs.

    Without `include_images`, training images are reduced to `BLURRED` pixels before they are
    enlarged again: the detail is not hidden but gone. The same holds for generations as near to a
    training image as only copies are, since they show it too.
    """

    def __init__(self, audit: LoraAudit, *, include_images: bool):
        self._audit, self._include = audit, include_images
        self._positions = {g.path: n for n, g in enumerate(audit.generations)}

    def training(self, index: int, side: int = SMALL) -> str | None:
        """Return a training image by position; None when its file cannot be read."""
        training = self._audit.training
        path = path_of(training, training.images[index])
        return _uri(path, side, blurred=not self._include)

    def generation(self, index: int, side: int = SMALL) -> str | None:
        """Return a generation by position; None when its file cannot be read."""
        path = self._audit.folder / self._audit.generations[index].path
        return _uri(path, side, blurred=self.blurs(index))

    def blurs(self, index: int) -> bool:
        """Return whether a generation is shown blurred."""
        return self._hides(self._audit.generations[index].similarity)

    def member(self, path: str, similarity: float, side: int = SMALL) -> str | None:
        """Return a picture of the output folder that has `similarity` to a training image."""
        if path in self._positions:
            return self.generation(self._positions[path], side)
        return _uri(self._audit.folder / path, side, blurred=self._hides(similarity))

    def _hides(self, similarity: float) -> bool:
        near = self._audit.thresholds.near
        return not self._include and (near is None or similarity >= near)


def _uri(path: Path, side: int, *, blurred: bool) -> str | None:
    try:
        image = read_image(path)
    except ValueError:
        return None
    stream = BytesIO()
    (_blur(image, side) if blurred else _shrink(image, side)).save(stream, "webp", quality=85)
    return data_uri("image/webp", stream.getvalue())


def _shrink(image: "Image", side: int) -> "Image":
    from PIL import Image

    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _blur(image: "Image", side: int) -> "Image":
    """Return what is left of a picture after `BLURRED` pixels, enlarged softly."""
    from PIL import Image

    longer = max(image.size)
    few, many = (
        tuple(max(round(pixels * length / longer), 1) for length in image.size)
        for pixels in (BLURRED, side)
    )
    return image.resize(few, Image.Resampling.BOX).resize(many, Image.Resampling.BICUBIC)
