"""Whether two images are one, laid over each other: mirrored, cropped, compressed, recoloured.

Either may be a part of the other, with up to a quarter of each side gone. Which part is searched
among coarse views, whose edges are then moved until the two fit best. After that no place of the
two may show something else. So it is with what was saved again, shrunk, mirrored or cropped, and
not with two images of one character in one pose.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from ...shared.arrays import Float

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL, COARSE = 64, 16
"""Pixels a side that images are cropped at, and compared at."""
TILES = 4
"""On a side of an image."""
STEP, MOST = 4, 16
"""Pixels of `SMALL` between the edges of two views, and how many a view has lost of a side."""
TRIED = 5
"""Nearest views whose edges are moved."""
MOVES = (1.0, 0.5, 0.25)
"""Pixels of `SMALL` by which they are moved; of the finer ones, those of the best."""
FLAT = 24 / 255
"""Least deviation of pixels (0..1) that counts as contrast: saving alone changes flat images."""
COLOURLESS = 0.1
"""Most that the channels of an image in grey differ by, in its deviations."""
NEARBY = 0.9
"""Mean square difference, in variances of an image, up to which a view is moved. Copies
of drawings with thin lines are that far off before the edges are moved."""
UNLIKE = 0.1
"""The same of a tile, from which on two images show other things. Copies cropped by a quarter,
mirrored and saved as JPEG of quality 40 reach .06 after the moves; two images of one character .16,
two drawings of the demo in one repeated layout .37."""
AGREES = 0.06
"""Root mean square difference, of a range of 1, up to which pixels agree as a whole. Copies reach
.02."""
BRIGHTER = 1.25
"""Factor of the brightness that is forgiven there, either way."""

Pixels = Float[np.ndarray, "..."]
"""Of views if any, channels, rows and columns, in this order."""
Range = tuple[float, float]
"""Of a side, what is kept: from and to, in pixels of `SMALL`."""
LOST = range(0, MOST + 1, STEP)
KEPT: list[Range] = [
    (float(near), float(SMALL - far)) for near in LOST for far in LOST if near + far <= MOST
]
"""Of the views; the first is all of it."""


class Shown:
    """An image in small, and what it looks like as a part of itself, mirrored or not."""

    def __init__(self, image: "Image"):
        from PIL import Image

        small = image.convert("RGB").resize((SMALL, SMALL), Image.Resampling.BOX)
        whole = np.asarray(small, np.float32).transpose(2, 0, 1) / 255
        self.sides: tuple[Pixels, Pixels] = whole, whole[:, :, ::-1]
        """As it is, and mirrored."""
        views = [cut(side, rows, columns)
                 for side, rows, columns in product(self.sides, KEPT, KEPT)]  # fmt: skip
        self.views: Pixels = standardized(np.stack(views))
        """Of each side, of all rows that are kept, and of all columns; the first is the whole."""

    @property
    def colourless(self) -> bool:
        """Return whether the image is in shades of grey."""
        return bool(np.ptp(self.views[0], axis=0).max() < COLOURLESS)

    @cached_property
    def grey(self) -> Pixels:
        """Return the views in grey."""
        return in_grey(self.views)

    def part(self, view: int) -> tuple[Pixels, Range, Range]:
        """Return the side that a view belongs to, its rows and its columns."""
        side, rows, columns = np.unravel_index(view, (2, len(KEPT), len(KEPT)))
        return self.sides[side], KEPT[rows], KEPT[columns]


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """How two images differ where one lies on the other as best it can."""

    apart: float
    """Root mean square difference of the pixels, of a range of 1, brightness forgiven."""
    worst_tile: float
    """Greatest mean square difference of a tile, in variances of an image."""

    @property
    def agrees(self) -> bool:
        """Return whether the pixels are alike as a whole."""
        return self.apart <= AGREES

    @property
    def same_everywhere(self) -> bool:
        """Return whether no tile shows something else."""
        return self.worst_tile < UNLIKE


def lay_over(one: Shown, other: Shown) -> Overlay | None:
    """Return how two images differ at their best; None where no view of either comes near.

    Args:
        one: An image.
        other: Another; which is a part of which is found.
    """
    grey = one.colourless or other.colourless
    starts = []
    for cropped, whole in ((one, other), (other, one)):
        views, target = (cropped.grey, whole.grey[0]) if grey else (cropped.views, whole.views[0])
        apart = _apart_from(views, target)
        starts += [(apart[v], cropped, whole, int(v)) for v in apart.argsort()[:TRIED]]
    starts = sorted(starts, key=lambda start: start[0])[:TRIED]
    if starts[0][0] > NEARBY:
        return None
    fits = [_Fit(cropped.part(view), whole, grey)
            for _, cropped, whole, view in starts]  # fmt: skip
    for fit in fits:
        fit.move(MOVES[0])
    best = min(fits, key=lambda fit: fit.apart)
    for by in MOVES[1:]:
        best.move(by)
    tiles = (_prepared(best.part, grey) - best.target) ** 2
    tiles = tiles.reshape(-1, TILES, COARSE // TILES, TILES, COARSE // TILES).mean((0, 2, 4))
    return Overlay(apart=_brightened(best.part, cut(best.whole.sides[0], KEPT[0], KEPT[0])),
                   worst_tile=float(tiles.max()))  # fmt: skip


def _apart_from(views: Pixels, target: Pixels) -> Float[np.ndarray, " view"]:
    """Return the mean square difference of each view."""
    rows, one = views.reshape(len(views), -1), target.reshape(-1)
    return ((rows**2).sum(1) - 2 * rows @ one + (one**2).sum()) / len(one)


class _Fit:
    """A part of an image that is moved on another."""

    def __init__(self, start: tuple[Pixels, Range, Range], whole: Shown, grey: bool):
        self.side, rows, columns = start
        self.edges = [*rows, *columns]
        self.whole, self.grey = whole, grey
        self.target = whole.grey[0] if grey else whole.views[0]
        self.apart, self.part = self._measured(self.edges)

    def move(self, by: float) -> None:
        """Move edges, and opposite ones together, for as long as the part comes nearer."""
        moved = True
        while moved:
            moved = False
            for which, step in product(((0,), (1,), (2,), (3,), (0, 1), (2, 3)), (-by, by)):
                edges = [edge + step * (place in which) for place, edge in enumerate(self.edges)]
                if not _allowed(edges):
                    continue
                apart, part = self._measured(edges)
                if apart < self.apart:
                    self.apart, self.part, self.edges, moved = apart, part, edges, True

    def _measured(self, edges: list[float]) -> tuple[float, Pixels]:
        part = cut(self.side, (edges[0], edges[1]), (edges[2], edges[3]))
        return float(((_prepared(part, self.grey) - self.target) ** 2).mean()), part


def _allowed(edges: list[float]) -> bool:
    """Return whether edges lie in the image, with little more gone than of a view."""
    inside = all(0 <= edge <= SMALL for edge in edges)
    least = SMALL - MOST - STEP
    return inside and min(edges[1] - edges[0], edges[3] - edges[2]) >= least


def cut(side: Pixels, rows: Range, columns: Range) -> Pixels:
    """Return a part of an image in `COARSE` pixels a side."""
    return _weights(rows) @ side @ _weights(columns).T


@lru_cache(maxsize=4096)
def _weights(kept: Range) -> Float[np.ndarray, "row pixel"]:
    """Return what each pixel counts in each of the `COARSE` rows of a part."""
    edges = np.linspace(*kept, COARSE + 1, dtype=np.float32)
    first, pixels = edges[:-1, None], np.arange(SMALL, dtype=np.float32)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(first, pixels)
    return shared.clip(0) / (edges[1] - edges[0])


def standardized(views: Pixels) -> Pixels:
    """Return pixels about the mean of their channel, in deviations of the image."""
    views = views - views.mean((-2, -1), keepdims=True)
    return views / views.std((-3, -2, -1), keepdims=True).clip(FLAT)


def in_grey(views: Pixels) -> Pixels:
    """Return the mean of standardized channels, standardized."""
    grey = views.mean(-3, keepdims=True)
    return grey / grey.std((-3, -2, -1), keepdims=True).clip(1e-6)


def _prepared(part: Pixels, grey: bool) -> Pixels:
    return in_grey(standardized(part)) if grey else standardized(part)


def _brightened(part: Pixels, whole: Pixels) -> float:
    """Return the root mean square difference, the part as much brighter as fits best."""
    gain = float((part * whole).sum()) / max(float((part**2).sum()), 1e-9)
    gain = min(BRIGHTER, max(1 / BRIGHTER, gain))
    return float(np.sqrt(((gain * part - whole) ** 2).mean()))
