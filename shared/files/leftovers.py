"""What lies in image folders and is no image of the subject: named, and left out."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..wording import counted, name_some

BESIDE = ("-masklabel", "-condlabel")
"""Ends of the names of masks and conditions that OneTrainer lays beside images."""
CACHES = {"_latent_cache", "_t_e_cache", "_clip_vision_cache", "_controls"}
"""Folders that ai-toolkit makes among the images."""
NAMES = 20
"""Names in a sentence about them."""


def without_leftovers(paths: Iterable[Path], folder: Path) -> tuple[list[Path], list[str]]:
    """Return what a training reads of the files below a folder, and sentences about the rest.

    A named pipe is left out, which would be waited for; a broken link is kept, to be told as such.
    """
    kept: list[Path] = []
    left: dict[str, list[Path]] = {}
    for path in paths:
        if reason := _reason(path, folder):
            left.setdefault(reason, []).append(path)
        else:
            kept.append(path)
    return kept, [_sentence(names, reason, folder) for reason, names in left.items()]


def _reason(path: Path, folder: Path) -> str | None:
    """Return what a file is instead of an image, None for what may be one."""
    inside = path.relative_to(folder).parts
    if path.stem.endswith(BESIDE):
        return "masks or conditions that OneTrainer lays beside images"
    if any(part.startswith(".") for part in inside):
        return "hidden, such as copies that editors and notebooks keep"
    if CACHES.intersection(inside[:-1]):
        return "in a folder that a trainer made"
    return "no regular files" if path.exists() and not path.is_file() else None


def _sentence(paths: Sequence[Path], reason: str, folder: Path) -> str:
    files = counted(len(paths), "file is", "files are")
    names = name_some((path.relative_to(folder).as_posix() for path in paths), NAMES)
    return f"{files} left out ({reason}): {names}."
