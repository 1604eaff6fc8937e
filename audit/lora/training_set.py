"""The images a LoRA was trained on, read from the folder that the trainer read."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ...shared.files.images import read_image
from ...shared.files.prompts import PromptError
from ...shared.score.detection import Progress
from ...shared.wording import counted, name_some
from .folder_layout import Shown, read_layout
from .header import Header
from .result import TrainingImage, TrainingSet
from .trigger import find_trigger

SHOWN = 20
"""Names in a warning."""


def read_training_set(
    folder: Path,
    *,
    trigger: str | None = None,
    header: Header | None = None,
    held_out: Path | None = None,
    reserve: float = 0.0,
    progress: Progress | None = None,
) -> TrainingSet:
    """Return the images of a training folder, each of them opened once to see that it is whole.

    Read are kohya's folders (``10_name class``, at any depth, captions beside the images), folders
    with ``metadata.jsonl``, ``.csv`` or ``.parquet``, and plain ones. Links to folders are
    followed, each folder is read once. What is left out is told in `warnings`, by name.

    An image is a control only when it was **not** trained on, and nobody but the user knows that.
    So nothing is held out by chance: either `held_out` names a folder of further images of the
    same subject, or `reserve` says that a share was left out of the training. Which images that
    are is decided by their sha256 alone, so that it can be asked *before* the training and does
    not change with names or order. `read_lora_facts` warns when the header of the LoRA counts
    them among those it was trained on.

    Args:
        folder: Of training images.
        trigger: The word that stands for what is taught; None to look for it.
        header: Of the LoRA: tells regularisation folders, repeats of a plain folder, and tags.
        held_out: Further images of the same subject that were not trained on; may lie in `folder`.
        reserve: Share of the folder that was left out of the training, 0 to below 1.
        progress: Called with the number of images opened since the last call.

    Raises:
        PromptError: No such folder, no image that can be read, or a broken caption file or table.
        ValueError: `reserve` is out of range, or given beside `held_out`.
    """
    folder, header = _existing(folder), header or Header()
    if not 0 <= reserve < 1:
        raise ValueError(f"`reserve` must be at least 0 and below 1, got {reserve}.")
    if held_out and reserve:
        raise ValueError("Give `held_out` or `reserve`, not both.")
    held_out = _existing(held_out) if held_out else None
    layout = read_layout(folder, header, without=held_out)
    images, warnings = _open_all(layout.shown, folder, progress)
    warnings = [*layout.warnings, *warnings]
    if not images:
        told = " ".join(warnings)
        raise PromptError(
            f"{folder} holds no image that can be read. Give the folder that the training reads. "
            f"{told}".strip()
        )
    if held_out:
        controls, more = _further(held_out, images, progress)
    else:
        images, controls, more = _reserve(images, reserve)
    warnings += more
    if trigger is None:
        trigger = find_trigger([image.caption for image in images], layout.concepts, header)
        if len(layout.concepts) > 1:
            warnings.append(
                f"The folder teaches {len(layout.concepts)} things: {name_some(layout.concepts)}. "
                f"Only {trigger!r} is asked for alone; name another with --trigger."
            )
    return TrainingSet(
        folder=folder,
        layout=layout.kind,
        images=(*images, *(replace(image, held_out=True) for image in controls)),
        trigger=trigger,
        held_out_folder=held_out,
        warnings=tuple(warnings),
    )


def path_of(training: TrainingSet, image: TrainingImage) -> Path:
    """Return the file of an image of the set."""
    elsewhere = training.held_out_folder if image.held_out else None
    return (elsewhere or training.folder) / image.name


def _existing(folder: Path) -> Path:
    """Return the absolute path of a folder without `..`, or say that there is none."""
    if not Path(folder).is_dir():
        raise PromptError(f"No such folder: {folder}. Give the folder that the training reads.")
    return Path(os.path.abspath(folder))


def _open_all(
    shown: Iterable[Shown], folder: Path, progress: Progress | None
) -> tuple[list[TrainingImage], list[str]]:
    """Return the images that can be read, by name, and what is to be said of the others."""
    images, nameless, broken = [], [], []
    named = {one.path.relative_to(folder).as_posix(): one for one in shown}
    for name, one in sorted(named.items()):
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            nameless.append(ascii(name))
        else:
            try:
                size = read_image(one.path).size
            except ValueError:
                broken.append(name)
            else:
                sha256 = hashlib.sha256(one.path.read_bytes()).hexdigest()
                images.append(
                    TrainingImage(name=name, sha256=sha256, caption=one.caption,
                                  repeats=one.repeats, size=size)
                )  # fmt: skip
        if progress is not None:
            progress(1)
    faults = {
        ("file is left out, since it is not a whole image",
         "files are left out, since they are not whole images"): broken,
        ("file is left out, since its name is not Unicode",
         "files are left out, since their names are not Unicode"): nameless,
    }  # fmt: skip
    warnings = [
        f"{counted(len(names), *left_out)}: {name_some(names, SHOWN)}."
        for left_out, names in faults.items()
        if names
    ]
    return images, warnings


def _further(
    folder: Path, trained: Sequence[TrainingImage], progress: Progress | None
) -> tuple[list[TrainingImage], list[str]]:
    """Return the images of a held-out folder that were not trained on, and what is to be said."""
    layout = read_layout(folder, Header())
    images, warnings = _open_all(layout.shown, folder, progress)
    known = {image.sha256 for image in trained}
    if same := [image.name for image in images if image.sha256 in known]:
        warnings.append(
            f"{counted(len(same), 'image is', 'images are')} left out, since the training folder "
            f"holds the same: {name_some(same)}."
        )
    controls = [image for image in images if image.sha256 not in known]
    if not controls:
        warnings.append("No image is left, so there are no controls of the same subject.")
    return controls, [f"Held out: {warning}" for warning in (*layout.warnings, *warnings)]


def _reserve(
    images: Sequence[TrainingImage], share: float
) -> tuple[list[TrainingImage], list[TrainingImage], list[str]]:
    """Return the images that were trained on, the share that was not, and what is to be said.

    Equal images are never on both sides, and one image at least was trained on.
    """
    hashes = sorted({image.sha256 for image in images})
    chosen = set(hashes[: min(round(share * len(hashes)), len(hashes) - 1)])
    trained = [image for image in images if image.sha256 not in chosen]
    reserved = [image for image in images if image.sha256 in chosen]
    warnings = []
    if share:
        names = name_some((image.name for image in reserved), SHOWN) or "none"
        warnings.append(
            f"{counted(len(reserved), 'image counts', 'images count')} as not trained on: {names}. "
            "Such images are controls only if they were left out of the training."
        )
    return trained, reserved, warnings
