"""Whether an image is a copy of any of a set of images, however many these are.

The more images are compared, the nearer the nearest lies by chance, but not in relation to the
second nearest. Where they lie around an image in k dimensions and know nothing of each other,
(d_1 / d_2)^k is uniform on 0 to 1 however many there are, and j log(d_{j+1} / d_j), j = 1, 2, ...,
are independent exponentials of mean 1 / k (Rényi's representation; Levina and Bickel 2004 estimate
k by it). So k is measured from the second nearest image on, which no copy moves, and the limit of
d_1 / d_2 follows from the rate alone. No pair of look-alike images moves it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arrays import Float

RATE = 0.01
"""Share of the generations that copy nothing but are called copies of *any* image, at most."""
IMAGES = 8
"""Training images that the rule of any image needs, at least."""
NEIGHBOURS, FEWEST = 12, 4
"""Distinct training images around a generation that k is measured from, at most and at least."""
ALIKE = 0.15
"""Training images that differ by less than this part of the median distance between training
images count as one: saved again, resized, signed. In SSCD a cosine of about .98, in pixels a root
mean square difference of about 4 % of the range."""
SAMPLE = 500
"""Training images that a median distance is taken over, at most."""
TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How near a copy is, in one kind of features; fixed on models with known truth."""

    own_factor: float
    """Of the own image's quantile."""
    ratio: float
    """Of the nearest to the second nearest image, at most, however many dimensions there are."""


class TrainingImages:
    """Training images by their features and captions, and which of them count as one."""

    def __init__(self, rows: Float[Tensor, " image number"], captions: Sequence[str]):
        if len(rows) != len(captions) or len(rows) < 2:
            raise ValueError(
                "At least 2 training images with a caption each are needed, got "
                f"{len(rows)} images and {len(captions)} captions."
            )
        self.rows, self.captions = rows, tuple(captions)
        self.own: dict[str, list[int]] = {}
        """Images by caption."""
        for index, caption in enumerate(captions):
            self.own.setdefault(caption, []).append(index)
        self._same: dict[int, set[int]] = {}
        sample = rows[:: math.ceil(len(rows) / SAMPLE)]
        self.alike = ALIKE * torch.cat(
            [torch.cdist(part, sample).median(1).values for part in rows.split(4096)]
        )
        """[image] Distance under which another image counts as this one."""

    def counts_as(self, index: int, others: Sequence[int]) -> list[bool]:
        """Return which of other images differ so little from an image that they count as it."""
        apart = torch.linalg.vector_norm(self.rows[others] - self.rows[index], dim=1)
        return (apart < self.alike[index]).tolist()

    def same(self, index: int) -> set[int]:
        """Return the images that count as one with an image, itself among them."""
        if index not in self._same:
            near = torch.cdist(self.rows[index : index + 1], self.rows)[0] < self.alike[index]
            self._same[index] = {index, *near.nonzero().flatten().tolist()}
        return self._same[index]

    def standing_out(self, ordered: Tensor, distances: Float[Tensor, " image"]) -> float:
        """Return how far the nearest image stands out: its distance over that of the second.

        Where the nearest c images count as one, the c-th over the next after it, if that is less.
        By chance (d_c / d_{c+1})^(c k) is uniform, so all c together reach a limit set for a rate
        in little more than that share: rate + rate^2 + ...
        """
        near, ratio = distances[ordered].double().clamp_min(TINY).tolist(), 1.0
        for place in range(1, len(near)):
            ratio = min(ratio, near[place - 1] / near[place])
            if not self.counts_as(int(ordered[0]), [int(ordered[place])])[0]:
                break
        return ratio

    def distinct(self, ordered: Tensor, count: int) -> list[int]:
        """Return the first `count` images of a list, of those that count as one the first."""
        kept: list[int] = []
        for index in map(int, ordered):
            if not any(self.counts_as(index, kept)):
                kept.append(index)
                if len(kept) == count:
                    break
        return kept


def dimension_around(
    distances: Float[Tensor, " generation image"], ordered: Tensor,
    training: TrainingImages,
) -> tuple[float | None, int]:  # fmt: skip
    """Return k, None when there are too few distinct images, and from how many spacings.

    Of few images only the nearest quarter is used: farther out the density falls, and k with it.
    """
    count = neighbours_of(len(training.rows))
    return dimension_of(row[training.distinct(order, count)]
                        for row, order in zip(distances, ordered, strict=True))  # fmt: skip


def neighbours_of(images: int) -> int:
    """Return how many distinct images around a generation k is measured from."""
    return min(NEIGHBOURS, max(FEWEST, images // 4))


def dimension_of(nearest: Iterable[Float[Tensor, " image"]]) -> tuple[float | None, int]:
    """Return k as `dimension_around`, from the distances to each generation's nearest images."""
    spacings = []
    for row in nearest:
        near = row.double().clamp_min(TINY)
        if len(near) < FEWEST:
            return None, 0
        spacings.append(torch.arange(2, len(near)) * (near[2:] / near[1:-1]).log())
    every = torch.cat(spacings)
    return 1 / every.mean().clamp_min(TINY).item(), len(every)


def ratio_limit(dimension: float, spacings: int, rate: float) -> float:
    """Return the ratio under which a share `rate` falls of generations that copy nothing.

    k log(d_2 / d_1), with k from n spacings, is distributed as F(2, 2 n): it exceeds t with
    probability (1 + t / n)^-n.
    """
    n, first = spacings, rate / (1 + rate)  # a group of images has its own chance, see standing_out
    return math.exp(-n / dimension * (first ** (-1 / n) - 1))


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The image of a set that one image is nearest to, and whether it is a copy of that one."""

    index: int
    """Of the nearest image of the set."""
    distance: float
    """To it, in the units of the features."""
    ratio: float
    """As `TrainingImages.standing_out`."""
    limit: float | None
    """`ratio` below which it is a copy; None of a set that is too small to tell."""

    @property
    def copied(self) -> bool:
        """Return whether it is a copy; never of a set that is too small to tell."""
        return self.limit is not None and self.ratio < self.limit


def nearest(
    images: Float[Tensor, " image number"], known: TrainingImages, bounds: Bounds, *,
    rate: float = RATE,
) -> list[Nearest]:  # fmt: skip
    """Return for each image whether it copies any of a set, each by itself.

    k comes from the set: images lie among its images as these lie among each other. So the images
    of one batch, which show the same thing, need not be independent of each other.

    Args:
        images: Features as those of the set.
        known: The set; fewer than `IMAGES` tell nothing.
        bounds: Of these features.
        rate: Share of the images that copy nothing but are called copies, at most, in (0, 1).
    """
    limit = None
    if len(known.rows) >= IMAGES:
        sample = known.rows[:: math.ceil(len(known.rows) / SAMPLE)]
        count, around = neighbours_of(len(known.rows)), []
        for row in torch.cdist(sample, known.rows):
            others = row.argsort(stable=True)[1:]  # but itself
            around.append(row[known.distinct(others, count)])
        dimension, spacings = dimension_of(around)
        limit = dimension and min(bounds.ratio, ratio_limit(dimension, spacings, rate))
    found = []
    for row in torch.cdist(images, known.rows):
        order = row.argsort(stable=True)
        index = int(order[0])
        found.append(Nearest(index=index, distance=float(row[index]),
                             ratio=known.standing_out(order, row), limit=limit))  # fmt: skip
    return found
