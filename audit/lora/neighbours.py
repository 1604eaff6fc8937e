"""Nearest neighbours among many images, and near-duplicates among those of a training set.

Near-duplicates are what most of all makes a model give images back. Two things tell them: that
their pixels agree, laid over each other, or SSCD, which finds what was recoloured as well. Either
way no place of the two images may show something else (see `overlay`).
"""

import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...shared.arrays import Float, Tensor
from ...shared.dependencies import require
from .overlay import Shown, lay_over
from .result import DuplicateGroup

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLE = 32
"""Images whose edits set the threshold; further ones hardly move it."""
KEPT = 0.95
"""Share of lightly edited copies that the threshold finds."""
CROP = 0.04
"""Share that a light crop takes off each side."""
CANDIDATES = 0.4
"""Cosine from which on the pixels of two images are compared: a drawing that lost its frame, a
quarter of each side, comes down to .43."""
VIEWED = 64
"""Images whose views are kept while they are compared: 120 MB with those in grey."""


class Index:
    """Unit vectors to search among, by faiss; a search compares with all of them, exactly.

    faiss keeps a copy of the rows and nothing more: 205 MB for 100,000 of 512 numbers.
    """

    def __init__(self, rows: Float[Tensor, " image dimension"]):
        """Put `rows`, each of length 1, into an index.

        Raises:
            ImportError: faiss is not installed; says what to type.
            ValueError: There are no rows.
        """
        if not len(rows):
            raise ValueError("An index needs at least one row.")
        faiss = require("faiss", purpose="Searching among training images", extra="sscd")
        self._index = faiss.IndexFlatIP(rows.shape[1])
        self._index.add(_array(rows))

    def search(self, rows: Float[Tensor, " query dimension"], k: int = 1) -> tuple[Tensor, Tensor]:
        """Return the cosines of each row's `k` neighbours, largest first, and their positions.

        Both are [query k], float32 and int64; k is smaller when there are fewer rows.
        """
        cosines, positions = self._index.search(_array(rows), min(k, self._index.ntotal))
        return torch.from_numpy(cosines).clamp(-1, 1), torch.from_numpy(positions)

    def pairs(self, threshold: float) -> tuple[Tensor, Tensor]:
        """Return all pairs of rows whose cosine is at least `threshold`, and these cosines.

        Positions are [pair 2], int64, the lower first and in rising order; cosines [pair], float32.
        """
        count = self._index.ntotal
        rows = self._index.reconstruct_n(0, count)
        # faiss takes what lies above a number, not what is equal to it.
        above = float(np.nextafter(np.float32(threshold), np.float32(-2)))
        ends, cosines, second = self._index.range_search(rows, above)
        first = np.repeat(np.arange(count), np.diff(ends.astype(np.int64)))
        kept = np.flatnonzero(first < second)
        kept = kept[np.lexsort((second[kept], first[kept]))]
        pairs = np.stack([first[kept], second[kept]], axis=1)
        return torch.from_numpy(pairs), torch.from_numpy(cosines[kept]).clamp(-1, 1)


def _array(rows: Tensor) -> np.ndarray:
    """Return rows as faiss reads them."""
    return np.ascontiguousarray(rows.detach().cpu().float().numpy())


def find_duplicates(
    rows: Float[Tensor, " image dimension"], sha256: Sequence[str], threshold: float,
    images: "Sequence[Image] | None" = None,
) -> tuple[DuplicateGroup, ...]:  # fmt: skip
    """Return the groups of images that are linked by similarity, the largest first.

    Two images are linked when their files are equal, or they agree everywhere and either the cosine
    of their unit vectors is at least `threshold` or their pixels are close as a whole: JPEG's noise
    lowers the cosine below that of two images of one character. On flat art either alone would link
    drawings that share a layout: a frame, a ground, and something else in the middle. A group may
    be a chain: its `similarity` is the lowest cosine of any two members.

    Args:
        rows: Unit vectors of the images.
        sha256: Of their files.
        threshold: From `duplicate_threshold`.
        images: To compare their pixels; None takes the cosine's word.
    """
    if len(rows) != len(sha256):
        raise ValueError(f"{len(rows)} rows but {len(sha256)} hashes.")
    if not len(rows):
        return ()
    first: dict[str, int] = {}
    equal = [(first.setdefault(key, index), index) for index, key in enumerate(sha256)]
    distinct = torch.tensor(list(first.values()))
    pairs, cosines = Index(rows[distinct]).pairs(
        threshold if images is None else min(threshold, CANDIDATES)
    )
    near = distinct[pairs].tolist()
    if images is not None:
        near = _showing_the_same(near, (cosines >= threshold).tolist(), images)
    groups = []
    for members in _connected(len(rows), [*equal, *near]):
        together = rows[members] @ rows[members].T
        groups.append(DuplicateGroup(
            images=tuple(members), exact=len({sha256[member] for member in members}) == 1,
            similarity=min(1.0, together.min().item()),
        ))  # fmt: skip
    return tuple(sorted(groups, key=lambda group: (-len(group.images), group.images)))


def _showing_the_same(
    pairs: Sequence[Sequence[int]], alike: Sequence[bool], images: "Sequence[Image]"
) -> list[Sequence[int]]:
    """Return the pairs whose images agree everywhere, without those between linked images.

    Args:
        pairs: Positions of two images each.
        alike: Whether the cosine of a pair is enough, or its pixels must be close as a whole.
        images: All of them.
    """

    @lru_cache(maxsize=VIEWED)
    def shown(index: int) -> Shown:
        return Shown(images[index])

    groups: dict[int, set[int]] = {}
    kept = []
    for (first, second), enough in zip(pairs, alike, strict=True):
        one, other = (groups.setdefault(end, {end}) for end in (first, second))
        if one is other:
            continue
        laid = lay_over(shown(first), shown(second))
        if laid is not None and laid.same_everywhere and (enough or laid.agrees):
            kept.append((first, second))
            one |= other
            groups |= dict.fromkeys(other, one)
    return kept


def _connected(count: int, links: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the connected components with two members or more, members rising."""
    purpose = "Grouping near-duplicates"
    sparse = require("scipy.sparse", purpose=purpose, extra="reports")
    graph = require("scipy.sparse.csgraph", purpose=purpose, extra="reports")
    ends = np.asarray(links).T
    matrix = sparse.coo_array((np.ones(len(links), dtype=bool), tuple(ends)), shape=(count, count))
    components: dict[int, list[int]] = {}
    for member, label in enumerate(graph.connected_components(matrix, directed=False)[1].tolist()):
        components.setdefault(label, []).append(member)
    return [members for members in components.values() if len(members) > 1]


def duplicate_threshold(
    images: "Sequence[Image]", embed: Callable[..., Float[Tensor, " image dimension"]]
) -> float:
    """Return the cosine from which on an image counts as a near-duplicate of another.

    On flat art unrelated images pass the .5 that the literature calls a copy, so the images set
    it themselves: a near-duplicate is as close as an image is to its own lightly edited copy. The
    threshold is what `KEPT` of such copies reach: recompressed (JPEG, quality 75), shrunk to half,
    and cropped by `CROP` on each side.

    Args:
        images: Of the training set, at least one; `SAMPLE` of them, evenly spread, are edited.
        embed: From images to unit vectors, such as `Sscd().embed`.
    """
    cosines = []
    for index in range(0, len(images), max(1, len(images) // SAMPLE)):
        image = images[index].convert("RGB")
        rows = embed([image, *_edits(image)])
        cosines.append(rows[1:] @ rows[0])
    return torch.quantile(torch.cat(cosines), 1 - KEPT).clamp(max=1).item()


def _edits(image: "Image") -> "list[Image]":
    """Return lightly edited copies of an image."""
    from PIL import Image

    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    width, height = image.size
    left, top = int(CROP * width), int(CROP * height)
    return [
        Image.open(file),
        image.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.LANCZOS),
        image.crop((left, top, width - left, height - top)),
    ]
