"""Image files, read as RGB one at a time and written whole or not at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .storage import replace_atomically

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageFiles(Sequence):
    """A sequence of image files, each opened when its index is read."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> "Image":  # type: ignore[override]  # slices are not read
        return read_image(self._paths[index])


def read_image(path: Path) -> "Image":
    """Return an image file as RGB.

    Raises:
        ValueError: The file is no readable image; the message names it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image ({error}).") from error


def save_png(image: "Image", path: Path) -> None:
    """Write an image as PNG, whole or not at all.

    Raises:
        StorageError: Nothing can be written.
    """
    with replace_atomically(path) as part:
        image.save(part, format="PNG")
