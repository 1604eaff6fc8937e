"""Image files, read as RGB one at a time and written whole or not at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .storage import replace_atomically

if TYPE_CHECKING:
    from PIL.Image import Image


ORIENTATION = 0x0112
"""EXIF's tag for how an image is to be turned; 1 for not at all."""


class ImageFiles(Sequence):
    """A sequence of image files, each opened when its index is read."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> "Image":  # type: ignore[override]  # slices are not read
        return read_image(self._paths[index])


def read_image(path: Path) -> "Image":
    """Return an image file as RGB, upright as its EXIF orientation says, 16 bits scaled to 8.

    Raises:
        ValueError: The file is no readable image; the message names it.
    """
    from PIL import Image, ImageOps

    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a readable image (it is no regular file).")
    try:
        with Image.open(path) as image:
            return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except Exception as error:  # decoders raise whatever the bytes of a broken file make them raise
        raise ValueError(f"{path} is not a readable image ({error}).") from error


def is_turned(path: Path) -> bool:
    """Return whether an image file notes that it is to be shown turned or mirrored."""
    from PIL import Image

    with Image.open(path) as image:
        return image.getexif().get(ORIENTATION, 1) not in (0, 1)


def _eight_bits(image: "Image") -> "Image":
    """Return an image whose values go from 0 to 255; Pillow clips larger ones to white."""
    import numpy as np
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    largest = values.max(initial=0)
    whites = (1.0, 255.0) if image.mode == "F" else (65535.0, 2.0**31 - 1)
    white = next((white for white in whites if largest <= white), largest)
    return Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))


def save_png(image: "Image", path: Path) -> None:
    """Write an image as PNG, whole or not at all.

    Raises:
        StorageError: Nothing can be written.
    """
    with replace_atomically(path) as part:
        image.save(part, format="PNG")
