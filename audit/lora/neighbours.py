"""Nearest neighbours among many images, and near-duplicates among those of a training set.

Near-duplicates are what most of all makes a model give images back. Two things tell them. Laid over
each other, one mirrored and cropped as the other may be, their pixels agree: so it is with what was
saved again, shrunk or cropped a little, and not with one character in one pose. SSCD finds what was
recoloured or cropped further. Either way no part of the two images may show something else.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...shared.arrays import Float, Tensor
from ...shared.dependencies import require
from .result import DuplicateGroup

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLE = 32
"""Images whose edits set the threshold; further ones hardly move it."""
KEPT = 0.95
"""Share of lightly edited copies that the threshold finds."""
CROP = 0.04
"""Share that a light crop takes off each side."""
TILES = 4
"""Of `COARSE` pixels a side, on a side of an image."""
FLAT = 24 / 255
"""Least deviation of pixels (0..1) that counts as contrast: saving alone changes flat images."""
COLOURLESS = 0.1
"""Most that the channels of an image in grey differ by, in its deviations."""
UNLIKE = 0.2
"""Mean square difference of a tile, in variances of an image, from which on two images show other
things. The demo's drawings in one repeated layout differ by .37 and more in some tile; drawings and
parts of photographs from themselves compressed, shrunk, cropped by 8 %, brightened by a tenth or
mirrored by .07 and less."""
MARGINS = (0.04, 0.08, 0.12, 0.16, 0.2, 0.24)
"""Shares of a side that a crop may have taken off, in the corners, at the edges or all around."""
OF_TILES = 4
"""Of these, those that tiles are compared under: of more an image is too little in one place."""
SMALL, COARSE = 64, 16
"""Pixels a side that images are cropped at, and compared at."""
AGREES = 0.06
"""Root mean square difference, of a range of 1, up to which pixels agree. Edited copies reach .05,
images of one character in one pose come down to .07."""
BRIGHTER = 1.25
"""Factor of the brightness that is forgiven, either way."""
CANDIDATES = 0.6
"""Cosine from which on the pixels of two images are compared."""
VIEWED = 128
"""Images whose views are kept while they are compared: 43 MB."""
PLACES = (0, 0.5, 1)
"""Of what a crop takes off, the share that it takes at the left or at the top."""


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
    pairs = distinct[pairs]
    near = pairs.tolist()
    if images is not None and len(pairs):

        @lru_cache(maxsize=VIEWED)
        def views(index: int) -> Tensor:
            return views_of(images[index])

        alike = (differences(pairs, views) <= AGREES) | (cosines >= threshold)
        near = _showing_the_same(pairs[alike].tolist(), views)
    groups = []
    for members in _connected(len(rows), [*equal, *near]):
        together = rows[members] @ rows[members].T
        groups.append(DuplicateGroup(
            images=tuple(members), exact=len({sha256[member] for member in members}) == 1,
            similarity=min(1.0, together.min().item()),
        ))  # fmt: skip
    return tuple(sorted(groups, key=lambda group: (-len(group.images), group.images)))


def _showing_the_same(
    links: Sequence[Sequence[int]], views: "Callable[[int], Float[Tensor, ' view number']]"
) -> list[Sequence[int]]:
    """Return the links whose images agree everywhere, without those between linked images."""
    groups: dict[int, set[int]] = {}
    kept = []
    for link in links:
        one, other = (groups.setdefault(end, {end}) for end in link)
        if one is not other and _agree(*(_tiles(views(index)) for index in link)):
            kept.append(link)
            one |= other
            groups |= dict.fromkeys(other, one)
    return kept


def _tiles(views: Float[Tensor, " view number"]) -> np.ndarray:
    """Return an image and crops of it, standardized, [crop tile row tile column channel]."""
    pixels = views[: 1 + OF_TILES * len(PLACES) ** 2].numpy()
    pixels = pixels.reshape(len(pixels), COARSE, COARSE, 3)
    pixels = pixels - pixels.mean((1, 2), keepdims=True)
    pixels /= pixels.std((1, 2, 3), keepdims=True).clip(FLAT)
    return pixels.reshape(len(pixels), TILES, COARSE // TILES, TILES, COARSE // TILES, 3)


def _agree(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether no tile differs, for some crop of either, mirrored or not."""
    if min(np.ptp(each[0], axis=-1).max() for each in (one, other)) < COLOURLESS:
        grey = (each.mean(-1, keepdims=True) for each in (one, other))
        one, other = (each / each.std((1, 2, 3, 4, 5), keepdims=True).clip(1e-6) for each in grey)
    mirrored = other[:, :, :, ::-1, ::-1]
    worst = [
        ((crops - whole[:1]) ** 2).mean((2, 4, 5)).max((1, 2)).min()
        for second in (other, mirrored) for crops, whole in ((one, second), (second, one))
    ]  # fmt: skip
    return bool(min(worst) < UNLIKE)


def differences(
    pairs: Tensor, views: "Callable[[int], Float[Tensor, ' view number']]"
) -> Float[Tensor, " pair"]:
    """Return how far the pixels of two images are apart, laid over each other as best they can be.

    The root mean square difference of one as it is and the other in whatever view of it comes
    nearest, of two images whose values range from 0 to 1.

    Args:
        pairs: Positions of images [pair 2], the first ones rising.
        views: Returns an image by position as `views_of` shows it.
    """
    result = torch.empty(len(pairs))
    whole = {index: views(index)[0] for index in pairs.unique().tolist()}
    for column in (0, 1):
        other = torch.stack([whole[index] for index in pairs[:, 1 - column].tolist()])
        for index in pairs[:, column].unique().tolist():
            places = (pairs[:, column] == index).nonzero().flatten()
            apart = _apart(views(index), other[places])
            result[places] = apart if column == 0 else torch.minimum(result[places], apart)
    return result


def _apart(shown: Tensor, others: Tensor) -> Tensor:
    """Return the difference [other] of the nearest of some views [view number], brightened."""
    products, norms = shown @ others.T, shown.square().sum(1, keepdim=True)
    gain = (products / norms.clamp_min(1e-9)).clamp(1 / BRIGHTER, BRIGHTER)
    squares = gain.square() * norms - 2 * gain * products + others.square().sum(1)
    return (squares.clamp_min(0).amin(0) / others.shape[1]).sqrt()


def views_of(image: "Image") -> Float[Tensor, " view number"]:
    """Return an image in small, mirrored, and cropped in all ways; the first one is as it is.

    Rows of `COARSE` x `COARSE` RGB values in 0..1.
    """
    from PIL import Image, ImageOps

    small = image.convert("RGB").resize((SMALL, SMALL), Image.Resampling.BOX)
    every = [
        np.asarray(side.resize((COARSE, COARSE), Image.Resampling.BOX, box=box))
        for side in (small, ImageOps.mirror(small)) for box in _crops()
    ]  # fmt: skip
    return torch.from_numpy(np.stack(every)).flatten(1).float() / 255


def _crops() -> Iterator[tuple[float, float, float, float]]:
    """Yield the whole of an image of `SMALL` pixels, then its crops."""
    yield 0, 0, SMALL, SMALL
    for margin, across, down in product(MARGINS, PLACES, PLACES):
        left, top, lost = across * margin * SMALL, down * margin * SMALL, margin * SMALL
        yield left, top, SMALL - lost + left, SMALL - lost + top


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
