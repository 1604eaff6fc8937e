"""The images a LoRA was trained on, read from the folder that the trainer read."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ...shared.files.images import ImageNotRead, is_turned, read_image
from ...shared.files.leftovers import without_leftovers
from ...shared.files.prompts import (
    IMAGE_SUFFIXES,
    MARKS,
    METADATA,
    PromptError,
    caption_of,
    caption_text,
    read_table,
)
from ...shared.files.unused import unused_files
from ...shared.files.weights import file_sha256
from ...shared.wording import counted, name_some, visible
from .header import Header
from .result import TrainingImage, TrainingSet


class TrainedWordsUnknown(PromptError):
    """Nothing says by which words the images were trained; an option has to."""


NAMES = 20
"""Names of files in a warning about them."""
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
    """The image files that a trainer reads in a folder; none of them was opened yet."""

    kind: Literal["kohya", "metadata", "plain"]
    shown: Sequence[Shown]
    concepts: Mapping[str, int] = field(default_factory=dict)
    """Per `name class` of kohya's folders, how many images are shown in an epoch."""
    warnings: Sequence[str] = ()


def read_training_set(
    folder: Path,
    header: Header,
    *,
    instance_prompt: str | None = None,
    trigger: str | None = None,
    held_out: Path | None = None,
    reserve: float = 0.0,
) -> TrainingSet:
    """Return the images of a training folder; each is opened once to see that it is whole.

    Three layouts are read: kohya's folders (``10_name class``, at any depth, captions beside the
    images), folders with ``metadata.jsonl``, ``.csv`` or ``.parquet``, and plain ones. Links to
    folders are followed, each folder is read once. `warnings` names what is left out.

    An image is a control only when it was **not** trained on, and nobody but the user knows that.
    So nothing is held out by chance: either `held_out` names a folder of further images of the
    same subject, or `reserve` says that a share was left out of the training. The sha256 of the
    images alone decides which ones that are, so that it can be known *before* the training and
    does not change with names or order. `read` warns when the header of the LoRA counts them among
    the images it was trained on.

    Args:
        folder: Of training images.
        header: Of the LoRA: tells regularisation folders, repeats of a plain folder, and tags.
        instance_prompt: The words that images without a caption were trained with.
        trigger: The word that stands for what is taught; None to look for it.
        held_out: Further images of the same subject that were not trained on; may lie in `folder`.
        reserve: Share of the folder that was left out of the training, 0 to below 1.

    Raises:
        PromptError: No such folder, no image that can be read, or a broken caption file or table.
    """
    folder = _existing(folder)
    held_out = _existing(held_out) if held_out else None
    layout = read_layout(folder, header, without=held_out)
    images, broken = open_images(layout.shown, folder)
    warnings = [*layout.warnings, *broken]
    if not images:
        raise PromptError(" ".join([
            f"{folder} holds no image that can be read. Give the folder that the training reads.",
            *warnings,
        ]))  # fmt: skip
    if held_out:
        controls, more = _further(held_out, images)
    else:
        images, controls, more = _reserve(images, reserve)
    warnings += more
    if trigger is None:
        trigger = find_trigger([image.caption for image in images], layout.concepts, header)
        if len(layout.concepts) > 1:
            warnings.append(
                f"The folder teaches {len(layout.concepts)} things: {name_some(layout.concepts)}. "
                f"Only {trigger!r} is used as a prompt of its own; name another with --trigger."
            )
    images, controls = (_named(group, trigger) for group in (images, controls))
    words = instance_prompt or trigger
    images, more = _captioned(images, words, instance_prompt=bool(instance_prompt))
    controls, _ = _captioned(controls, words, instance_prompt=False)
    warnings += more
    return TrainingSet(
        folder=folder,
        layout=layout.kind,
        images=(*images, *(replace(image, held_out=True) for image in controls)),
        trigger=trigger,
        held_out_folder=held_out,
        warnings=tuple(warnings),
    )


def _named(images: Sequence[TrainingImage], trigger: str) -> list[TrainingImage]:
    """Return the images with the trigger where ai-toolkit puts it into captions.

    Raises:
        TrainedWordsUnknown: Captions have a mark for it, and it is not known.
    """
    marked = [image.name for image in images if any(mark in image.caption for mark in MARKS)]
    if marked and not trigger:
        have = counted(len(marked), "caption has", "captions have")
        raise TrainedWordsUnknown(
            f"{have} {MARKS[0]} or {MARKS[1]}, in whose place ai-toolkit trains its trigger_word: "
            f"{name_some(marked)}. Name that word with --trigger; where there was none, take the "
            "marks out of copies of the captions."
        )
    pattern = re.compile("|".join(map(re.escape, MARKS)))
    return [
        replace(image, caption=pattern.sub(lambda _: trigger, image.caption)) for image in images
    ]


def _captioned(
    images: Sequence[TrainingImage], words: str, *, instance_prompt: bool
) -> tuple[list[TrainingImage], list[str]]:
    """Return the images with these words where they have no caption, and warnings."""
    bare = [image.name for image in images if not image.caption]
    named = [replace(image, caption=image.caption or words) for image in images]
    if not bare:
        unused = "The instance prompt is not used: every image has a caption."
        return named, [unused] if instance_prompt else []
    if instance_prompt or not words:
        return named, []
    have = counted(len(bare), "image has", "images have")
    return named, [f"{have} no caption and {'is' if len(bare) == 1 else 'are'} asked for by the "
                   f"trigger alone, {visible(words)!r}."]  # fmt: skip


def _existing(folder: Path) -> Path:
    """Return the absolute path of a folder without `..`, or say that there is none."""
    if not folder.is_dir():
        raise PromptError(f"No such folder: {folder}. Give the folder that the training reads.")
    return Path(os.path.abspath(folder))


def read_layout(folder: Path, header: Header, *, without: Path | None = None) -> Layout:
    """Return the image files that a trainer reads in a folder, leaving out a folder below it."""
    files = [path for path in read_files(folder) if without is None or without not in path.parents]
    read = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES or p.name in METADATA]
    read, warnings = without_leftovers(read, folder)
    images = [path for path in read if path.name not in METADATA]
    warnings += unused_files(files, images, folder)
    if tables := [path for path in read if path.name in METADATA]:
        layout = _from_tables(folder, tables, images)
        return replace(layout, warnings=[*warnings, *layout.warnings])
    learnt = [path for path in images if not _regularises(path, folder, header)]
    if count := len(images) - len(learnt):
        warnings.append(
            f"{counted(count, 'regularisation image is', 'regularisation images are')} left out: "
            "such images show the class, not what is taught."
        )
    if any(REPEATED.fullmatch(path.parent.name) for path in learnt):
        layout = _from_kohya(folder, learnt)
        return replace(layout, warnings=[*layout.warnings, *warnings])
    known = header.folders.get(folder.name)
    repeats = known.repeats if known else 1
    shown = [Shown(path=path, caption=caption_of(path), repeats=repeats) for path in learnt]
    return Layout(kind="plain", shown=shown, warnings=warnings)


def read_files(folder: Path) -> Iterator[Path]:
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
    named = any(part.casefold() in REGULARISATION for part in above)
    return named or header.regularises(image.parent.name)


def _from_kohya(folder: Path, images: Sequence[Path]) -> Layout:
    """Return the images that lie directly in folders such as ``10_name class``."""
    shown, outside, concepts = [], [], Counter[str]()
    for path in images:
        if match := REPEATED.fullmatch(path.parent.name):
            repeats, concept = int(match[1]), match[2]
            shown.append(Shown(path=path, caption=caption_of(path), repeats=repeats))
            concepts[concept] += repeats
        else:
            outside.append(path.relative_to(folder).as_posix())
    warnings = []
    if outside:
        warnings.append(
            f"{counted(len(outside), 'image is', 'images are')} left out, since kohya's scripts "
            f"read only images directly in a folder such as `10_name class`: {name_some(outside)}."
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
        "images have several captions, of which the first is used": [
            names[path] for path, texts in captions.items() if len(set(texts)) > 1
        ],
    }
    return Layout(
        kind="metadata",
        shown=[Shown(path=path, caption=texts[0], repeats=len(texts))
               for path, texts in captions.items() if texts],
        warnings=[f"{len(which)} {fault}: {name_some(which)}."
                  for fault, which in faults.items() if which],
    )  # fmt: skip


def open_images(shown: Iterable[Shown], folder: Path) -> tuple[list[TrainingImage], list[str]]:
    """Return the images that can be read, by name, and warnings about the others."""
    images, nameless, unread, broken, turned, longer = [], [], [], [], [], []
    named = {one.path.relative_to(folder).as_posix(): one for one in shown}
    for name, one in sorted(named.items()):
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            nameless.append(ascii(name))
            continue
        try:
            size = read_image(one.path).size
        except ImageNotRead as error:
            unread.append(f"{name} ({error})")
            continue
        except ValueError:
            broken.append(name)
            continue
        if is_turned(one.path):
            turned.append(name)
        first, *further = (caption_text(one.path) or "").splitlines() or [""]
        if one.caption == first and any(line.strip() for line in further):
            longer.append(name)
        images.append(TrainingImage(name=name, sha256=file_sha256(one.path), caption=one.caption,
                                    repeats=one.repeats, size=size))  # fmt: skip
    faults = {
        ("file is left out, since it is not a whole image",
         "files are left out, since they are not whole images"): broken,
        ("image is left out", "images are left out"): unread,
        ("file is left out, since its name is not Unicode",
         "files are left out, since their names are not Unicode"): nameless,
        ("image is compared upright, as its camera noted: trained as it is stored (sd-scripts), a "
         "copy would lie on its side and not be found",
         "images are compared upright, as their cameras noted: trained as they are stored "
         "(sd-scripts), copies would lie on their side and not be found"): turned,
        ("caption file has further lines, which sd-scripts does not read and nothing asks for",
         "caption files have further lines, which sd-scripts does not read and nothing asks for"):
            longer,
    }  # fmt: skip
    return images, [f"{counted(len(names), *fault)}: {name_some(names, NAMES)}."
                    for fault, names in faults.items() if names]  # fmt: skip


def _further(
    folder: Path, trained: Sequence[TrainingImage]
) -> tuple[list[TrainingImage], list[str]]:
    """Return the images of a held-out folder that were not trained on, and warnings."""
    layout = read_layout(folder, Header())
    images, warnings = open_images(layout.shown, folder)
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
    """Return the images that were trained on, the share that was not, and warnings.

    Equal images are never on both sides, and one image at least was trained on.
    """
    hashes = sorted({image.sha256 for image in images})
    chosen = set(hashes[: min(round(share * len(hashes)), len(hashes) - 1)])
    trained = [image for image in images if image.sha256 not in chosen]
    reserved = [image for image in images if image.sha256 in chosen]
    if not share:
        return trained, reserved, []
    names = name_some((image.name for image in reserved), NAMES) or "none"
    return trained, reserved, [
        f"{counted(len(reserved), 'image counts', 'images count')} as not trained on: {names}. "
        "Such images are controls only if they were left out of the training."
    ]  # fmt: skip


def find_trigger(captions: Sequence[str], concepts: Mapping[str, int], header: Header) -> str:
    """Return the word or phrase that stands for what is taught, empty when none is known.

    The first tag that stands in every caption, as the LoRA's header counts them or else as the
    captions read; then the name of kohya's folder ``10_name class``, of which the last word is the
    class. Of several concepts the one that is shown most.
    """
    if tag := _sole_tag(header) or _tag_in_all(header) or _first_tag(captions):
        return tag
    words = max(concepts, key=lambda name: concepts[name], default="").split()
    return " ".join(words[:-1] or words)


def _sole_tag(header: Header) -> str:
    """Return the trigger that ai-toolkit writes as the only tag, once, of a folder of its name."""
    if len(header.learnt_tags) != 1:
        return ""
    (folder, counts), *_ = header.learnt_tags.items()
    return next((tag for tag in counts if dict(counts) == {tag: 1} and folder == f"1_{tag}"), "")


def _tag_in_all(header: Header) -> str:
    """Return the first tag that the header counts as often as there are images."""
    if not header.learnt_tags.keys() <= header.folders.keys():
        return ""  # how many images a folder had is not known
    images = sum(header.folders[name].images for name in header.learnt_tags)
    counts = header.tag_counts()
    return next((tag for tag, count in counts.items() if count >= images > 1), "")


def _first_tag(captions: Sequence[str]) -> str:
    """Return the first comma-separated part that stands in all of several captions."""
    parts = [[part.strip() for part in caption.split(",")] for caption in captions]
    if len(set(captions)) < 2:
        return ""
    return next((tag for tag in parts[0] if tag and not any(mark in tag for mark in MARKS)
                 and all(tag in other for other in parts)), "")  # fmt: skip
