"""Duplicates in a training folder before anything is trained on it, and lists without them.

Nothing in the folder is changed. Of each group one image is kept: the one with the most pixels, of
those the largest file (a copy that was compressed again is smaller), of those the first by name.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...shared.files.images import ImageFiles
from ...shared.files.prompts import PromptError
from ...shared.files.storage import make_folder, write_text
from ...shared.wording import counted
from ..common.measure import Bars
from ..common.pages import Embedder, render_page
from ..common.sscd import Sscd
from .feature_cache import FeatureCache
from .header import Header
from .neighbours import duplicate_threshold, find_duplicates
from .result import DuplicateGroup, TrainingImage
from .training_set import REPEATED, open_images, read_layout

Method = Literal["hash", "sscd"]
"""Equal files alone, or near-duplicates too."""
KEPT, FOUND, PAGE = "kept.json", "duplicates.json", "duplicates.html"
"""Names of the files that are written."""
GROUPS, TILES = 200, 12
"""Groups on the page, and images of each."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images of which one is enough."""

    kept: TrainingImage
    others: tuple[TrainingImage, ...]
    exact: bool
    """All have the same bytes."""
    similarity: float
    """Lowest cosine within the group; 1 for equal files."""

    @property
    def captions(self) -> int:
        """Return how many different captions the group has."""
        return len({image.caption for image in (self.kept, *self.others)})


@dataclass(frozen=True, kw_only=True)
class FolderDuplicates:
    """What was found in a folder."""

    folder: Path
    layout: Literal["kohya", "metadata", "plain"]
    images: tuple[TrainingImage, ...]
    """All that a trainer reads, regularisation images left out, by name."""
    groups: tuple[Group, ...]
    """The largest first."""
    threshold: float | None
    """Cosine from which on two images were compared as near-duplicates; None for equal files."""
    warnings: tuple[str, ...]

    @property
    def surplus(self) -> tuple[str, ...]:
        """Return the names of the images that a training can do without."""
        return tuple(sorted(image.name for group in self.groups for image in group.others))

    @property
    def repeats(self) -> tuple[int, ...]:
        """Return the different numbers of times that images are shown in an epoch."""
        return tuple(sorted({image.repeats for image in self.images}))

    @property
    def headline(self) -> str:
        """Return the finding in plain words."""
        total = counted(len(self.images), "image", "images")
        if not self.groups:
            return f"No duplicates among {total}"
        again = counted(len(self.surplus), "is a duplicate", "are duplicates")
        return f"{again.replace(' ', f' of {total} ', 1)} of others"


def find_in_folder(folder: Path, *, method: Method, bars: Bars) -> FolderDuplicates:
    """Return the duplicates among the images that a trainer reads in a folder.

    Args:
        folder: In any layout of `read_layout`.
        method: "hash" finds equal files, "sscd" also what was cropped, mirrored, compressed or
            recoloured, by the rules of the LoRA's audit.
        bars: Makes the progress bar.

    Raises:
        PromptError: There is no such folder, or no image in it that can be read.
        ImportError: The extra `sscd` is not installed.
    """
    if not folder.is_dir():
        raise PromptError(f"No such folder: {folder}. Give the folder that the training reads.")
    folder = Path(os.path.abspath(folder))
    layout = read_layout(folder, Header())
    images, broken = open_images(layout.shown, folder)
    if not images:
        raise PromptError(f"{folder} holds no image that can be read.")
    near = _near(folder, images, bars) if method == "sscd" else None
    found, threshold = near or (_equal(images), None)
    return FolderDuplicates(
        folder=folder,
        layout=layout.kind,
        images=tuple(images),
        groups=tuple(_group(folder, images, each) for each in found),
        threshold=threshold,
        warnings=(*layout.warnings, *broken),
    )


def _near(
    folder: Path, images: Sequence[TrainingImage], bars: Bars
) -> tuple[tuple[DuplicateGroup, ...], float]:
    encoder, paths = Sscd(), [folder / image.name for image in images]
    with bars("images", len(paths), 0, "image") as progress:
        rows = FeatureCache(encoder).rows(paths, progress=progress.update)
    threshold = duplicate_threshold(ImageFiles(paths), encoder.embed)
    hashes = [image.sha256 for image in images]
    return find_duplicates(rows, hashes, threshold, ImageFiles(paths)), threshold


def _equal(images: Sequence[TrainingImage]) -> tuple[DuplicateGroup, ...]:
    """Return the groups of equal files, the largest first."""
    places: dict[str, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.sha256, []).append(place)
    several = [tuple(each) for each in places.values() if len(each) > 1]
    several.sort(key=lambda each: (-len(each), each))
    return tuple(DuplicateGroup(images=each, exact=True, similarity=1.0) for each in several)


def _group(folder: Path, images: Sequence[TrainingImage], found: DuplicateGroup) -> Group:
    def rank(image: TrainingImage) -> tuple[int, int, str]:
        width, height = image.size
        return -width * height, -(folder / image.name).stat().st_size, image.name

    kept, *others = sorted((images[place] for place in found.images), key=rank)
    return Group(kept=kept, others=tuple(others), exact=found.exact, similarity=found.similarity)


def write_lists(found: FolderDuplicates, output: Path) -> None:
    """Write the groups, the list of what is kept and the page into a folder.

    Raises:
        StorageError: Nothing can be written there.
        ImportError: The extra `reports` is not installed.
    """
    make_folder(output)
    surplus = set(found.surplus)
    kept = {
        str(found.folder / image.name): {"caption": image.caption or _words_of_folder(image)}
        for image in found.images
        if image.name not in surplus
    }
    write_text(output / KEPT, json.dumps(kept, indent=1) + "\n")
    write_text(output / FOUND, json.dumps(as_document(found), indent=1) + "\n")
    write_text(output / PAGE, _page(found))


def as_document(found: FolderDuplicates) -> dict[str, object]:
    """Return what was found as plain data."""
    return {
        "schema_version": 1,
        "folder": str(found.folder),
        "images": len(found.images),
        "threshold": found.threshold,
        "surplus": list(found.surplus),
        "groups": [
            {
                "kept": group.kept.name,
                "others": [image.name for image in group.others],
                "exact": group.exact,
                "similarity": group.similarity,
                "captions": group.captions,
            }
            for group in found.groups
        ],
        "warnings": list(found.warnings),
    }


def _words_of_folder(image: TrainingImage) -> str:
    """Return what sd-scripts trains an image without a caption with, in ``10_name class``."""
    match = REPEATED.fullmatch(Path(image.name).parent.name)
    return match[2] if match else ""


def _page(found: FolderDuplicates) -> str:
    embed = Embedder(found.folder)

    def tile(image: TrainingImage) -> dict[str, object]:
        return {"name": image.name, "caption": image.caption, "size": image.size,
                "uri": embed(image.name)}  # fmt: skip

    cards = [
        {
            "tiles": [tile(image) for image in (group.kept, *group.others)[:TILES]],
            "count": 1 + len(group.others), "exact": group.exact,
            "similarity": group.similarity, "captions": group.captions,
        }
        for group in found.groups[:GROUPS]
    ]  # fmt: skip
    return render_page(
        "duplicates.html.j2", found=found, cards=cards, kept=len(found.images) - len(found.surplus)
    )
