"""Image files, read as RGB one at a time and written whole or not at all."""

import math
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .storage import replace_atomically

if TYPE_CHECKING:
    from PIL.Image import Image


ORIENTATION = 0x0112
"""EXIF's tag for how an image is to be turned; 1 for not at all."""


FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Of Pillow: those that trainers read. Others, such as EPS, would start further programs."""
LATER = {".avif": "AVIF", ".webp": "WEBP"}
"""Formats by suffix that some builds of Pillow lack."""
ANIMATED = ("PNG", "WEBP", "GIF", "AVIF")
"""Formats whose further images are the frames of a clip; of others they are pages or previews."""
USUAL_TIME = 100.0
"""Milliseconds of a frame that names none."""
LARGEST = 100_000_000
"""Pixels of an image: a file of a few bytes can ask for the memory of billions."""


class ImageNotRead(ValueError):
    """An image that may be whole, and is not read all the same; says why and what to type."""


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
    from PIL import ImageOps

    with _opened(path) as image:
        return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")


def read_frames(path: Path, most: int) -> "list[Image]":
    """Return frames of a clip as RGB, equally far apart in time; of a still the one.

    Args:
        path: A still, or an animated PNG, WebP, GIF or AVIF.
        most: Frames at most; a clip has as many as the shortest of its frames goes into its time.

    Raises:
        ValueError: The file is no readable image; the message names it.
    """
    with _opened(path) as image:
        count = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
        if count > 1:
            ends, times, total = [], [], 0.0
            for frame in range(count):
                image.seek(frame)
                image.load()
                times.append(float(image.info.get("duration") or USUAL_TIME))
                ends.append(total := total + times[-1])
            length = min(most, max(1, round(total / min(times))))
            places = [bisect_right(ends, (k + 0.5) / length * total) for k in range(length)]
            frames = []
            for place in places:
                image.seek(place)
                frames.append(image.convert("RGB"))
            return frames
    return [read_image(path)]


def is_turned(path: Path) -> bool:
    """Return whether an image file notes that it is to be shown turned or mirrored.

    Raises:
        ValueError: The file is no readable image; the message names it.
    """
    with _opened(path) as image:
        return image.getexif().get(ORIENTATION, 1) not in (0, 1)


@contextmanager
def _opened(path: Path) -> "Iterator[Image]":
    """Yield an image of a format and a size that are read; what fails inside is its file's fault.

    Raises:
        ValueError: The file is no readable image; the message names it.
    """
    from PIL import Image

    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a readable image (it is no regular file).")
    try:
        Image.init()
        known = [name for name in FORMATS if name in Image.OPEN]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes: there is a limit below
            with Image.open(path, formats=known) as image:
                if math.prod(image.size) > LARGEST:
                    raise ImageNotRead(
                        f"{path} has {image.width} x {image.height} pixels, at most {LARGEST:,} "
                        "are read. Make it smaller, as trainers do before they read it."
                    )
                yield image
    except ImageNotRead:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, above ours
        raise ImageNotRead(f"{path} is not read: {error}. Make it smaller.") from error
    except Exception as error:  # decoders raise whatever the bytes of a broken file make them raise
        if lacks(path.suffix):
            lacking = LATER[path.suffix.lower()]
            raise ImageNotRead(
                f"{path} is not read: this Pillow has no {lacking}. Type: pip install -U pillow"
            ) from error
        raise ValueError(f"{path} is not a readable image ({error}).") from error


def lacks(suffix: str) -> bool:
    """Return whether the installed Pillow reads no images of a suffix that it could read."""
    from PIL import Image

    Image.init()
    return suffix.lower() in LATER and LATER[suffix.lower()] not in Image.OPEN


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


def save_clip(frames: "Sequence[Image]", path: Path) -> None:
    """Write frames as an animated PNG, one as a plain one, whole or not at all.

    Raises:
        StorageError: Nothing can be written.
    """
    if len(frames) == 1:
        save_png(frames[0], path)
        return
    with replace_atomically(path) as part:
        frames[0].save(part, format="PNG", save_all=True, append_images=frames[1:],
                       duration=USUAL_TIME)  # fmt: skip


def save_png(image: "Image", path: Path) -> None:
    """Write an image as PNG, whole or not at all.

    Raises:
        StorageError: Nothing can be written.
    """
    with replace_atomically(path) as part:
        image.save(part, format="PNG")
