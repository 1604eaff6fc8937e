"""Images compared with those of a folder, by the copy rule that needs nothing but the images."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import folder_paths
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from PIL import Image, ImageOps

from ...shared.arrays import Float, Tensor
from ...shared.copies.features import PIXELS
from ...shared.copies.neighbours import IMAGES, RATE, Nearest, TrainingImages, nearest
from ...shared.files.images import read_image
from ...shared.files.prompts import image_files
from ...shared.wording import counted, name_some

PIXELS_ALONE = (
    "Compared are small thumbnails, also mirrored: copies that were cropped far, recoloured or "
    "redrawn are not found."
)
TOO_FEW = (
    "No verdict: the rule compares the nearest image with the others of the folder and needs at "
    "least {} readable images, found {}. Add others of the same kind."
)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What the images of a batch are nearest to."""

    found: tuple[Nearest, ...]
    """One per image."""
    paths: tuple[Path, ...]
    """Of the images that they were compared with."""
    left_out: tuple[str, ...]
    """Names of those that cannot be read."""
    folder: Path

    @property
    def copied(self) -> bool:
        """Return whether any image is a copy; false without a verdict."""
        return any(one.copied for one in self.found)

    @property
    def closest(self) -> Nearest:
        """Return of the image that is nearest to one of the folder."""
        return min(self.found, key=lambda one: (not one.copied, one.distance))

    @property
    def similarity(self) -> float:
        """Return that of the closest, 1 for equal images."""
        return PIXELS.similarity(self.closest.distance)

    @property
    def headline(self) -> str:
        """Return the verdict in a few words."""
        if len(self.paths) < IMAGES:
            return "No verdict"
        copies = sum(one.copied for one in self.found)
        if len(self.found) == 1:
            return "Looks like a copy" if copies else "No copy found"
        return f"{copies} of {len(self.found)} images look like copies"

    def __str__(self) -> str:
        lines = [self.headline]
        for number, one in enumerate(self.found, 1):
            name = self.paths[one.index].relative_to(self.folder).as_posix()
            what = "copy of" if one.copied else "nearest to"
            similarity = PIXELS.similarity(one.distance)
            limit = "" if one.limit is None else f", ratio {one.ratio:.2g}, limit {one.limit:.2g}"
            lines.append(f"image {number}: {what} {name}, similarity {similarity:.2g}{limit}")
        if len(self.paths) < IMAGES:
            lines.append(TOO_FEW.format(IMAGES, len(self.paths)))
        else:
            number = counted(len(self.paths), "image", "images")
            lines.append(
                f"A copy is nearer to one image than to the next by more than chance allows in "
                f"{RATE:.2g} of images that copy none of the {number}."
            )
        if self.left_out:
            lines.append(f"Not readable and left out: {name_some(self.left_out)}.")
        return "\n".join([*lines, PIXELS_ALONE])


def compare(images: Float[Tensor, " image height width 3"], folder: str, node: str) -> Compared:
    """Return what images are nearest to in a folder.

    Args:
        images: 0..1.
        folder: As for `images_below`.
        node: As for `images_below`.

    Raises:
        ValueError: There is no such folder, or fewer than two readable images in it.
    """
    paths = images_below(folder, node)
    kept, rows, left_out = _features(tuple((path, path.stat().st_mtime_ns) for path in paths))
    if len(kept) < 2:
        raise ValueError(
            f"{paths[0].parent} holds {counted(len(kept), 'readable image', 'readable images')}: "
            f"give `folder` of {node} at least {IMAGES}."
        )
    known = TrainingImages(rows, [""] * len(rows))
    shown = [Image.fromarray(each) for each in _bytes(images)]
    # Both ways round share the rate.
    ways = [
        nearest(PIXELS.rows(some), known, PIXELS.bounds, rate=RATE / 2)
        for some in (shown, [ImageOps.mirror(each) for each in shown])
    ]
    found = [min(pair, key=lambda one: one.ratio) for pair in zip(*ways, strict=True)]
    return Compared(found=tuple(found), paths=kept, left_out=left_out, folder=folder_of(folder))


def folder_of(folder: str) -> Path:
    """Return a folder that is given as absolute, or below ComfyUI's input folder."""
    return Path(folder_paths.get_input_directory()) / folder


def images_below(folder: str, node: str) -> list[Path]:
    """Return the image files of a folder and all below it.

    Args:
        folder: Absolute, or below ComfyUI's input folder.
        node: Title of the node that asks, for errors.

    Raises:
        ValueError: There is no such folder, or no image in it.
    """
    path = folder_of(folder)
    if not folder or not path.is_dir():
        raise ValueError(
            f"There is no folder {folder!r}: give `folder` of {node} as an absolute path, or below "
            "ComfyUI's input folder."
        )
    if not (found := image_files(path)):
        raise ValueError(f"{path} holds no images: give a folder with training images.")
    return found


def _bytes(images: Tensor) -> "list":
    return list((images[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


@lru_cache(maxsize=2)
def _features(
    files: tuple[tuple[Path, int], ...],
) -> tuple[tuple[Path, ...], Tensor, tuple[str, ...]]:
    """Return the readable files, their features [image number], and the names of the others."""
    kept, rows, left_out, shown = [], [], [], ProgressBar(len(files))
    for path, _ in files:
        throw_exception_if_processing_interrupted()
        try:
            rows.append(PIXELS.rows([read_image(path)]))
            kept.append(path)
        except ValueError:
            left_out.append(path.name)
        shown.update(1)
    return tuple(kept), torch.cat(rows) if rows else torch.zeros(0, 1), tuple(left_out)
