"""What lies in a folder and is not used: named once, with what would make it usable."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..wording import counted, name_some
from .images import LATER, lacks

CAPTIONS = (".txt", ".caption")
"""Suffixes of caption files, in lower case as they are read."""
OTHERS = {
    ".heic", ".heif", ".jxl", ".jp2", ".psd", ".xcf", ".svg", ".eps", ".tga", ".ico", ".dds",
    ".exr", ".hdr", ".jfif", ".jpe", ".pnm", ".ppm", ".cr2", ".nef", ".arw", ".dng",
}  # fmt: skip
"""Suffixes of images that no trainer reads, or not every one."""
VIDEOS = {".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"}
"""Suffixes of videos, of which no decoder is installed."""
NAMES = 20
"""Names in a sentence about them."""


def unused_files(files: Iterable[Path], images: Sequence[Path], folder: Path) -> list[str]:
    """Return sentences on images that are not read and captions that match no image.

    Args:
        files: All below the folder.
        images: Those that are read.
        folder: To name them by.
    """
    stems: dict[Path, set[str]] = defaultdict(set)
    for image in images:
        stems[image.parent].add(image.stem)
    left: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        suffix = path.suffix.lower()
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if suffix in OTHERS:
            left["images of a kind that is not read: convert them to PNG"].append(path)
        elif suffix in VIDEOS:
            left["videos, which are not decoded: to audit a video model make them animated WebP, "
                 "`ffmpeg -i clip.mp4 -lossless 1 clip.webp`"].append(path)  # fmt: skip
        elif suffix in LATER and lacks(suffix):
            left["of a kind that this Pillow lacks: pip install -U pillow"].append(path)
        elif suffix in CAPTIONS and (reason := _mismatch(path, stems[path.parent])):
            left[reason].append(path)
    return [
        f"{counted(len(paths), 'file is', 'files are')} not used ({reason}): "
        f"{name_some((path.relative_to(folder).as_posix() for path in paths), NAMES)}."
        for reason, paths in left.items()
    ]


def _mismatch(caption: Path, stems: set[str]) -> str | None:
    """Return why a caption file belongs to no image; None where it does."""
    stem = caption.stem
    if stem in stems and caption.suffix in CAPTIONS:
        return None
    if stem in stems:
        return "captions whose suffix is in capitals: write it in small letters"
    if Path(stem).stem in stems:
        return "captions with two suffixes: leave the image's out of their names"
    if _plain(stem) in {unicodedata.normalize("NFC", each) for each in stems}:
        return "captions whose name is spelt in another normal form of Unicode than the image's"
    if _plain(stem).casefold() in {_plain(each).casefold() for each in stems}:
        return "captions whose name differs from the image's in capitals: rename them"
    return "captions of no image here"


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)
