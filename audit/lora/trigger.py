"""The trigger word: what a LoRA's user types to get what it was taught."""

from collections import Counter
from collections.abc import Mapping, Sequence

from .header import Header


def find_trigger(captions: Sequence[str], concepts: Mapping[str, int], header: Header) -> str:
    """Return the word or phrase that stands for what is taught, empty when none is known.

    The first tag that stands in every caption, as the LoRA's header counts them or else as the
    captions read; then the name of kohya's folder ``10_name class``, of which the last word is the
    class. Of several concepts the one that is shown most.

    Args:
        captions: Of the training images.
        concepts: Per `name class`, how many images are shown in an epoch.
        header: Of the LoRA.
    """
    if tag := _tag_in_all(header) or _first_tag(captions):
        return tag
    concept = max(concepts, key=lambda name: concepts[name], default="")
    words = concept.split()
    return " ".join(words[:-1] or words)


def _tag_in_all(header: Header) -> str:
    """Return the first tag that the header counts as often as there are images."""
    total, images = Counter(), 0
    for name, counts in header.tags.items():
        if name in header.regularisation and name not in header.folders:
            continue
        if name not in header.folders:  # how many images it had is not known
            return ""
        images += header.folders[name].images
        total.update(counts)
    return next((tag for tag, count in total.items() if count >= images > 1), "")


def _first_tag(captions: Sequence[str]) -> str:
    """Return the first comma-separated part that stands in all of several captions."""
    parts = [[part.strip() for part in caption.split(",")] for caption in captions]
    if len(set(captions)) < 2:
        return ""
    return next((tag for tag in parts[0] if tag and all(tag in other for other in parts)), "")
