"""Which files of a folder a trainer shows, how often, and with which caption."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...shared.files.prompts import IMAGE_SUFFIXES, METADATA, caption_of, read_table
from ...shared.wording import counted, name_some
from .header import Header

REPEATED = re.compile(r"0*([1-9]\d{0,5})_(.*)", re.DOTALL)
"""How kohya's scripts read the name of a folder: repeats, then the caption of images without."""
REGULARISATION = {
    "class_images", "reg", "reg_images", "regs", "regularisation", "regularisation_images",
    "regularization", "regularization_images",
}  # fmt: skip
"""Names of folders of images of the class, which are shown but not to be learnt."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An image file as the trainer shows it."""

    path: Path
    caption: str
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a trainer reads of a folder."""

    kind: Literal["kohya", "metadata", "plain"]
    shown: Sequence[Shown]
    concepts: dict[str, int] = field(default_factory=dict)
    """Per `name class` of kohya's folders, how many images are shown in an epoch."""
    warnings: list[str] = field(default_factory=list)


def read_layout(folder: Path, header: Header, *, without: Path | None = None) -> Layout:
    """Return the image files that a trainer reads of a folder; no image is opened.

    Args:
        folder: Of training images.
        header: Of the LoRA; tells folders of regularisation images and repeats.
        without: A folder below it that was not trained on.

    Raises:
        PromptError: A caption file or table cannot be read.
    """
    files = [path for path in _files(folder) if without is None or without not in path.parents]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    tables = [path for path in files if path.name in METADATA]
    if tables:
        return _from_tables(folder, tables, images)
    learnt = [path for path in images if not _regularises(path, folder, header)]
    if any(REPEATED.fullmatch(path.parent.name) for path in learnt):
        layout = _from_kohya(folder, learnt)
    else:
        known = header.folders.get(folder.name)
        repeats = known.repeats if known else 1
        shown = [Shown(path=path, caption=caption_of(path), repeats=repeats) for path in learnt]
        layout = Layout(kind="plain", shown=shown)
    if count := len(images) - len(learnt):
        layout.warnings.append(
            f"{counted(count, 'regularisation image is', 'regularisation images are')} left out: "
            "such images show the class, not what is taught."
        )
    return layout


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in order, through links to folders, each real folder once."""
    seen = set()
    for place, names, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            names.clear()
            continue
        seen.add(real)
        names.sort()
        yield from (Path(place, name) for name in sorted(files))


def _regularises(image: Path, folder: Path, header: Header) -> bool:
    """Return whether an image stands for the class alone."""
    above = image.relative_to(folder).parts[:-1]
    own = image.parent.name
    told = own in header.regularisation and own not in header.folders
    return told or any(part.casefold() in REGULARISATION for part in above)


def _from_kohya(folder: Path, images: Sequence[Path]) -> Layout:
    """Return the images that lie directly in folders such as ``10_name class``."""
    shown, concepts, outside = [], {}, []
    for path in images:
        match = REPEATED.fullmatch(path.parent.name)
        if match is None:
            outside.append(path.relative_to(folder).as_posix())
            continue
        repeats, concept = int(match[1]), match[2]
        shown.append(Shown(path=path, caption=caption_of(path), repeats=repeats))
        concepts[concept] = concepts.get(concept, 0) + repeats
    warnings = []
    if outside:
        warnings.append(
            f"{counted(len(outside), 'image is', 'images are')} left out, since kohya's scripts "
            f"read only those directly in a folder such as `10_name class`: {name_some(outside)}."
        )
    return Layout(kind="kohya", shown=shown, concepts=concepts, warnings=warnings)


def _from_tables(folder: Path, tables: Sequence[Path], images: Sequence[Path]) -> Layout:
    """Return the images that metadata files name; one more row shows an image once more."""
    captions: dict[Path, list[str]] = {path: [] for path in images}
    lost = []
    for table in tables:
        for row in read_table(table):
            path = row.image and Path(os.path.normpath(row.image))
            if path in captions:
                captions[path].append(row.text)
            else:
                lost.append((table.parent / row.source).relative_to(folder).as_posix())
    names = {path: path.relative_to(folder).as_posix() for path in images}
    faults = {
        "rows name no image beside their table and are left out": lost,
        "images are left out, since no table names them": [
            names[path] for path, texts in captions.items() if not texts
        ],
        "images have several captions, of which the first is asked for": [
            names[path] for path, texts in captions.items() if len(set(texts)) > 1
        ],
    }
    return Layout(
        kind="metadata",
        shown=[
            Shown(path=path, caption=texts[0], repeats=len(texts))
            for path, texts in captions.items()
            if texts
        ],
        warnings=[f"{len(o)} {fault}: {name_some(o)}." for fault, o in faults.items() if o],
    )
