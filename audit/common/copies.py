"""Which generated images are copies of training images: two questions, two rules.

*Is it a copy of its caption's own image?* When that image is the nearest one and lies nearer than
a fixed part of the `OWN_QUANTILE` quantile of what *other* prompts' generations reach to it, or to
whichever of the caption's images is nearest to each if there are several. The quantile is the
caption's own yardstick: everything is near to a pale image, and more is near to one of twelve.

*Is it a copy of any training image?* The more images are compared, the nearer the nearest lies by
chance, but not in relation to the second nearest. Where training images lie around a generation in
k dimensions and know nothing of each other, (d_1 / d_2)^k is uniform on 0 to 1 however many they
are, and j log(d_{j+1} / d_j), j = 1, 2, ..., are independent exponentials of mean 1 / k (Rényi's
representation; Levina and Bickel 2004 estimate k by it). So k is measured from the second nearest
image on, which no copy moves, and the limit of d_1 / d_2 follows from the rate alone.

Neither rule needs held-out images, and no pair of look-alike training images moves a limit. Both
need the generations of at least `OTHERS` other prompts, and give no verdict without.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...shared.arrays import Float

OWN_QUANTILE = 0.05
OTHERS = 20
"""Other prompts whose generations a verdict needs, at least."""
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


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one generation is nearest to, and what that means."""

    index: int
    """Of the nearest training image."""
    distance: float
    """To it, in the units of the features."""
    ratio: float
    """`distance` over that of the nearest image that is not alike to it, 0 to 1; small means that
    this image alone is meant."""
    is_own: bool
    """The nearest image belongs to the generation's caption, or is alike to one that does."""
    own_ratio: float | None
    """Distance to the caption's nearest own image over the quantile of the other prompts'
    generations; None without an own image or without enough others."""
    copied: bool | None
    """A copy of its own image or of any; None when the rule that should tell cannot."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The verdicts of generations that were judged together."""

    verdicts: tuple[Verdict, ...]
    limit: float | None
    """`ratio` below which a generation is a copy of any image, at most that of the bounds;
    None when too few prompts or images could tell."""
    dimension: float | None
    """k: the number of dimensions in which training images lie around generations."""


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


class _Yardstick:
    """How near generations come to a caption's images if they mean none of them."""

    def __init__(
        self, distances: Tensor, prompts: Sequence[str], training: TrainingImages,
        taken: Sequence[int | None],
    ):  # fmt: skip
        self.distances, self.prompts, self.training = distances, prompts, training
        self.taken = taken
        """Per generation, the image that it copies by the other rule, which needs no yardstick."""
        self._known: dict[int, float | None] = {}

    def quantile(self, index: int) -> float | None:
        """Return the `OWN_QUANTILE` quantile for an image; None with too few other prompts.

        It is taken over distances to the nearest image of the same caption. Left out are the
        prompts to which one of these images, or one that counts as one of them, belongs, and
        generations that copy one for another prompt.
        """
        if index not in self._known:
            own = self.training.own[self.training.captions[index]]
            same = set[int]().union(*map(self.training.same, own))
            owners = {self.training.captions[i] for i in same}
            rows = [row for row, prompt in enumerate(self.prompts)
                    if prompt not in owners and self.taken[row] not in same]  # fmt: skip
            enough = len({self.prompts[row] for row in rows}) >= OTHERS
            self._known[index] = (
                self.distances[:, own][rows].amin(1).quantile(OWN_QUANTILE).item()
                if enough
                else None
            )
        return self._known[index]


def judge(
    generated: Float[Tensor, " generation number"], prompts: Sequence[str],
    training: TrainingImages, bounds: Bounds, *, rate: float = RATE,
) -> Judged:  # fmt: skip
    """Say which generations are copies; they are each other's yardstick, so give all at once.

    Args:
        generated: Features as those of the training images.
        prompts: Of each generation; its own images have the same text as caption.
        training: The images to compare with.
        bounds: Of these features.
        rate: Of generations that copy nothing but are called copies of any image, in (0, 1).
    """
    distances = torch.cdist(generated, training.rows)
    ordered = distances.argsort(dim=1, stable=True)
    ratios = [training.standing_out(*pair) for pair in zip(ordered, distances, strict=True)]
    dimension = limit = None
    if len(set(prompts)) > OTHERS and len(training.rows) >= IMAGES:
        dimension, spacings = dimension_around(distances, ordered, training)
        limit = dimension and min(bounds.ratio, ratio_limit(dimension, spacings, rate))
    copies = [limit is not None and ratio < limit for ratio in ratios]
    nearest = ordered[:, 0].tolist()
    taken = [index if copy else None for index, copy in zip(nearest, copies, strict=True)]
    yardstick = _Yardstick(distances, prompts, training, taken)
    verdicts = []
    for number, (index, copied) in enumerate(zip(nearest, copies, strict=True)):
        own, is_own, own_ratio = training.own.get(prompts[number], []), False, None
        if own:
            best = min(own, key=distances[number].__getitem__)
            is_own = index in own or index in training.same(best)
            if quantile := yardstick.quantile(best):
                own_ratio = float(distances[number, best]) / quantile
        if is_own and own_ratio is not None:
            copied = copied or own_ratio < bounds.own_factor
        unknown = (bool(own) and own_ratio is None) or (not is_own and limit is None)
        verdicts.append(Verdict(
            index=index, distance=float(distances[number, index]), ratio=ratios[number],
            is_own=is_own, own_ratio=own_ratio, copied=None if unknown and not copied else copied,
        ))  # fmt: skip
    return Judged(verdicts=tuple(verdicts), limit=limit, dimension=dimension)
