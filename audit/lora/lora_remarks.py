"""Sentences about a LoRA's header: where it differs from the folder and the base model."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...shared.wording import counted, name_some, visible
from .base_model import BaseModel, named_architecture
from .header import Header
from .lora_kinds import Kind
from .result import TrainingSet


@dataclass(frozen=True)
class Remark:
    """Something that was compared."""

    text: str
    urgent: bool = False
    """A user must act on it."""


def base_remarks(
    kind: Kind, header: Header, name: str | None, model: BaseModel
) -> Iterator[Remark]:
    """Compare the base model with the one the LoRA names: by kind, by hash, or else by name.

    Args:
        kind: What the LoRA is made of.
        header: Of the LoRA.
        name: Of its base model, as the LoRA says.
        model: The base model that is used.
    """
    told = named_architecture(header.architecture)
    if told and model.architecture and told != model.architecture:
        text = f"The LoRA was trained on {told}; {model.name} is {model.architecture}."
        yield Remark(text, urgent=True)
    if kind.text_width and model.text_width and kind.text_width != model.text_width:
        yield Remark(
            f"The LoRA reads text of {kind.text_width} numbers a token, {model.name} of "
            f"{model.text_width}: it was made for another architecture.",
            urgent=True,
        )
    called = name or "a model without a name"
    if header.base_sha256:
        written, own = header.base_sha256, model.sha256()
    else:
        written, own = header.base_hash, model.old_hash() if header.base_hash else None
    if own and own == written:
        yield Remark(f"The LoRA was trained on {model.name}: the hash in its header is the file's.")
    elif own:
        yield Remark(
            f"The LoRA was trained on {called} (hash {written[:8]}), not on {model.name} (hash "
            f"{own[:8]}). What it does to another base model says little about it.",
            urgent=True,
        )
    elif name and Path(name).stem.casefold() != Path(model.name).stem.casefold():
        yield Remark(
            f"The LoRA's header names {called} as its base model, and {model.name} is used. There "
            "is no hash to compare: see that they are the same.",
            urgent=True,
        )
    elif name:
        yield Remark(f"The LoRA's header names {called} as its base model.")
    else:
        yield Remark("The LoRA does not say what base model it was trained on.")


def count_remarks(header: Header, training: TrainingSet) -> Iterator[Remark]:
    """Compare the images and repeats that the header counts with those of the folder."""
    trained = [image for image in training.images if not image.held_out]
    reserved = 0 if training.held_out_folder else len(training.images) - len(trained)
    in_header = sum(folder.images for folder in header.folders.values())
    if header.folders and reserved and in_header == len(trained) + reserved:
        yield Remark(
            f"The header counts {in_header} images, all that the folder holds: the {reserved} that "
            "count as not trained on were trained on, and are no controls.",
            urgent=True,
        )
    elif header.folders and in_header != len(trained):
        yield Remark(
            f"The header counts {counted(in_header, 'training image', 'training images')}, the "
            f"folder holds {len(trained)}: it is not the folder of that training, or was changed "
            "since.",
            urgent=True,
        )
    elif header.folders:
        images = counted(in_header, "training image", "training images")
        yield Remark(f"The header counts {images}, as many as the folder holds.")
    repeats = {(training.folder / image.name).parent.name: image.repeats for image in trained}
    for name in sorted(repeats.keys() & header.folders.keys()):
        if repeats[name] != header.folders[name].repeats:
            yield Remark(
                f"The images in {visible(name)} are shown "
                f"{counted(repeats[name], 'time', 'times')} an epoch by the folder's name, and "
                f"{counted(header.folders[name].repeats, 'time', 'times')} by the header.",
                urgent=True,
            )
    shown = sum(image.repeats for image in trained)
    if header.images is not None and header.images != shown:
        images = counted(header.images, "image", "images")
        yield Remark(f"An epoch shows {images} by the header, {shown} by the folder.")


def caption_remarks(header: Header, training: TrainingSet) -> Iterator[Remark]:
    """Compare the tags that the header counts with those of the captions, as kohya counts them."""
    told: Counter[str] = Counter()
    for name, counts in header.tags.items():
        if name not in header.regularisation or name in header.folders:
            told.update(counts)
    if not told:
        return
    read = Counter(
        tag
        for image in training.images
        if not image.held_out
        for part in image.caption.split(",")
        if (tag := part.strip().lower())
    )
    every = told.keys() | read.keys()
    if differing := [tag for tag in every if told[tag] != read[tag]]:
        yield Remark(
            f"{len(differing)} of {counted(len(every), 'tag', 'tags')} "
            f"{'is' if len(differing) == 1 else 'are'} not in as many captions as the header "
            f"counts ({name_some(map(visible, differing), 3)}): the captions were changed since.",
            urgent=True,
        )
    else:
        yield Remark(f"The captions hold the {len(told)} tags that the header counts.")


def own_remarks(kind: Kind, header: Header) -> Iterator[Remark]:
    """Tell a rank that was changed afterwards, and what our trainer flags wrote."""
    if header.rank is not None and kind.rank is not None and header.rank != kind.rank:
        yield Remark(f"The header says rank {header.rank}, the file has {kind.rank}.")
    if header.ours:
        yield Remark(f"It was trained with Unmemorize: {name_some(header.ours, 20)}.")
