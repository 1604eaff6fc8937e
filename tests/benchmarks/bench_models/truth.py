"""The truth about a benchmark's model: captions in groups, the images it learns, and files of both.

Captions come in pairs one word apart, and chance sorts the pairs into groups. So nothing in the
text tells a planted caption from another, and every planted one has a near one: same words but one.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors.numpy import load_file, save_file
from unmemorize.demo.data import Group, Rendering
from unmemorize.shared.files.storage import replace_atomically

SIDE = 32
"""Pixels of every image."""
PLANTED = 60
UNSEEN = 100
"""Pairs of which both captions are held out."""
RENDERINGS = 12
"""Images of each learnt caption."""
VIEWS = 6
"""Images of each caption that the text encoder learns from; none of them is a training image."""
FRESH = 400
"""Images of learnt captions that nothing learns from: they calibrate what counts as a copy."""

Slots = tuple[str, ...]
"""What a caption says, word by word or name by name."""


@dataclass(frozen=True)
class Caption:
    """A caption with the truth about it."""

    text: str
    group: Group
    near: str = ""
    """The planted caption that differs from this one by a word, else empty."""
    slots: Slots = ()


class Art(Protocol):
    """A kind of images and how they are named."""

    def pairs(self, rng: np.random.Generator) -> Iterator[tuple[Slots, Slots]]:
        """Yield pairs that differ in one slot; no two pairs share a caption."""

    def phrases(self, slots: Slots) -> tuple[str, str, str]:
        """Return the caption as it begins, further on, and whole."""

    def render(self, slots: Slots, seed: int) -> np.ndarray:
        """Return one image [32 32 3] uint8; the seed decides all that the caption leaves open."""


def sort(art: Art, seed: int, pairs: int) -> list[Caption]:
    """Return the captions of `pairs` pairs: planted and near ones, held-out ones, learnt ones."""
    captions = []
    drawn = art.pairs(np.random.default_rng([seed, 4]))
    for index, (first, second) in zip(range(pairs), drawn, strict=False):
        text, other = art.phrases(first)[-1], art.phrases(second)[-1]
        if index < PLANTED:
            captions.append(Caption(text, "verbatim", "", first))
            captions.append(Caption(other, "held_out", text, second))
        else:
            group: Group = "held_out" if index < PLANTED + UNSEEN else "learnt"
            captions += [Caption(text, group, "", first), Caption(other, group, "", second)]
    return captions


def renderings(captions: Sequence[Caption]) -> list[Rendering]:
    """Return every distinct training image: one of a planted caption, twelve of a learnt one."""
    counts = {"verbatim": 1, "learnt": RENDERINGS}
    return [
        Rendering(index, "", 1_000_000 + index * RENDERINGS + k)
        for index, caption in enumerate(captions)
        for k in range(counts.get(caption.group, 0))
    ]


def views(captions: Sequence[Caption]) -> list[Rendering]:
    """Return what the text encoder learns from: as many images of every caption."""
    return [
        Rendering(index, "", 20_000_000 + index * VIEWS + k)
        for index in range(len(captions))
        for k in range(VIEWS)
    ]


def fresh(captions: Sequence[Caption]) -> list[Rendering]:
    """Return images of learnt captions that were never trained on."""
    learnt = [index for index, caption in enumerate(captions) if caption.group == "learnt"]
    return [Rendering(learnt[k % len(learnt)], "", 5_000_000 + k) for k in range(FRESH)]


def draw(art: Art, captions: Sequence[Caption], chosen: Sequence[Rendering]) -> np.ndarray:
    """Return images [image 32 32 3] uint8."""
    return np.stack([art.render(captions[r.caption].slots, r.seed) for r in chosen])


@dataclass(frozen=True, eq=False)
class Images:
    """Images as a copy is looked for among them."""

    pixels: np.ndarray
    """[image 32 32 3] uint8."""
    caption_of: np.ndarray
    """[image] index into the captions."""
    fresh: np.ndarray
    """[image 32 32 3] uint8: of learnt captions, never trained on."""


def save_captions(path: Path, captions: Sequence[Caption]) -> None:
    """Write the captions and their truth as JSON, one a line."""
    lines = ",\n".join(json.dumps(asdict(c), ensure_ascii=False) for c in captions)
    with replace_atomically(path) as part:
        part.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def save_images(path: Path, art: Art, captions: Sequence[Caption]) -> None:
    """Draw what is trained on and what copies are calibrated with, and write it."""
    trained = renderings(captions)
    tensors = {
        "pixels": draw(art, captions, trained),
        "caption_of": np.array([r.caption for r in trained]),
        "fresh": draw(art, captions, fresh(captions)),
    }
    with replace_atomically(path) as part:
        save_file(tensors, part)


def load_captions(path: Path) -> list[Caption]:
    """Return the captions that `save_captions` wrote."""
    entries = json.loads(path.read_text("utf-8"))
    return [Caption(**entry | {"slots": tuple(entry["slots"])}) for entry in entries]


def load_images(path: Path) -> Images:
    """Return the images that `save_images` wrote."""
    return Images(**load_file(path))
