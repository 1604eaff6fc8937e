"""Which generated images are copies of training images: two questions, two rules.

*Is it a copy of its caption's own image?* When that image is the nearest one and lies nearer than
a fixed part of the `OWN_QUANTILE` quantile of what *other* prompts' generations reach to it, or to
whichever of the caption's images is nearest to each if there are several. The quantile is the
caption's own yardstick: everything is near to a pale image, and more is near to one of twelve.

*Is it a copy of any training image?* That rule stands in `shared.copies.neighbours`.

Neither rule needs held-out images, and no pair of look-alike training images moves a limit. Both
need the generations of at least `OTHERS` other prompts, and give no verdict without.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...shared.arrays import Float
from ...shared.copies.neighbours import (
    IMAGES,
    RATE,
    Bounds,
    TrainingImages,
    dimension_around,
    ratio_limit,
)

OWN_QUANTILE = 0.05
OTHERS = 20
"""Other prompts whose generations a verdict needs, at least."""


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
