"""Which generations copy which training image: each image is judged by a yardstick of its own.

Two questions, as in `common.copies`, in two kinds of features, pixels and SSCD. *Is it a copy of an
image whose words were asked?* When that image is the nearest and lies nearer than a part of its
yardstick: how near the `OWN_QUANTILE` of everything else comes that does not mean it. That is the
generations for other captions with the LoRA, which know the subject; what the base model draws for
other captions; and the other training images themselves, since one more image of the same subject
comes about as near as these do. The lowest of the three counts. *Is it a copy of any image?* When
the nearest stands out from the second nearest more than chance has it.

Near-duplicates count as one image and are never each other's yardstick. Nor is a generation that
copies an image for somebody else's words, as base model and training images have it. What the base
model draws for an image's own words is held against that yardstick and is no part of it. So no
image moves the threshold of another by coming back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...shared.arrays import Float, Tensor
from ...shared.copies.neighbours import (
    IMAGES,
    RATE,
    TINY,
    Bounds,
    dimension_of,
    neighbours_of,
    ratio_limit,
)
from ..common.copies import OTHERS, OWN_QUANTILE

FALSE = 0.05
"""Generations that an audit calls copies of *any* image by chance, of all with the LoRA."""
NONE, NEAR, COPY = 0, 1, 2
"""Marks of a generation against an image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """How far everything is apart in one kind of features."""

    generated: Float[Tensor, "generation image"]
    """Generations from training images."""
    images: Float[Tensor, "image image"]
    """Training images, as the model would draw them, from each other."""
    bounds: Bounds
    near: float
    """Part of the yardstick below which a generation is nearer than controls are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Roles:
    """What generations were asked, and what images are to each other."""

    own: Sequence[frozenset[int]]
    """Per generation, the images that its words were written for; empty for other words."""
    on: Sequence[bool]
    """Per generation, whether it was made with the LoRA."""
    plain: Sequence[bool]
    """Per generation, whether it was drawn in the ordinary way; others are no yardstick."""
    groups: Sequence[frozenset[int]]
    """Per image, itself and its near-duplicates."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Marked:
    """What the rule says of every generation and image."""

    marks: Float[Tensor, "generation image"]
    """`NONE`, `NEAR` or `COPY`."""
    own: Tensor
    """[generation image] Whether the image was asked for, and it or a near-duplicate is nearest."""
    alike: Tensor
    """[view generation image] Which images each kind of features has for near or a copy."""
    closeness: Float[Tensor, "generation image"]
    """Distance over that of a copy, in whichever features it is less; huge without a yardstick."""
    controls: tuple[int, ...]
    """Per image, what its yardstick was taken from."""


def mark(views: Sequence[View], roles: Roles) -> Marked:
    """Return which generations copy which images.

    Args:
        views: Of the same generations and images.
        roles: Of these.
    """
    shape = views[0].generated.shape
    marks, closeness = torch.zeros(shape), torch.full(shape, torch.inf)
    alike, owned = [], torch.zeros(shape, dtype=torch.bool)
    controls = tuple(count_controls(roles))
    for view in views:
        parts = view.generated / yardsticks(view, roles).clamp_min(TINY)
        part = parts / view.bounds.own_factor
        own = _own(view, roles)
        copies = _standing_out(view, roles, part) | ((part < 1) & own)
        alike.append(copies | (parts < view.near))
        marks = marks.maximum(NEAR * alike[-1]).maximum(COPY * copies)
        closeness, owned = closeness.minimum(part), owned | own
    return Marked(
        marks=marks, own=owned, alike=torch.stack(alike), closeness=closeness, controls=controls
    )


def count_controls(roles: Roles) -> list[int]:
    """Return how many generations and images each image's yardstick is taken from."""
    meant = _meant(roles)
    plain = [own for own, plain in zip(roles.own, roles.plain, strict=True) if plain]
    return [
        len(roles.groups) - len(group) + sum(own.isdisjoint(shared) for own in plain)
        for group, shared in zip(roles.groups, meant, strict=True)
    ]


def yardsticks(view: View, roles: Roles) -> Float[Tensor, " image"]:
    """Return each image's yardstick; 0, which nothing is nearer than, below `OTHERS` controls."""
    apart = view.images.clone()
    for image, group in enumerate(roles.groups):
        apart[image, sorted(group)] = torch.inf
    lengths = torch.zeros(len(roles.groups))
    every = zip(roles.groups, _meant(roles), count_controls(roles), strict=True)
    for image, (group, shared, count) in enumerate(every):
        if count < OTHERS:
            continue
        places, peers = sorted(shared), [i for i in range(len(apart)) if i not in group]
        others = [g for g, own in enumerate(roles.own)
                  if roles.plain[g] and own.isdisjoint(shared)]  # fmt: skip
        off, on = (view.generated[[g for g in others if roles.on[g] is lora]][:, places].amin(1)
                   for lora in (False, True))  # fmt: skip
        known = [part.quantile(OWN_QUANTILE)
                 for part in (apart[peers][:, places].amin(1), off) if len(part)]  # fmt: skip
        if known:
            on = on[on >= view.bounds.own_factor * min(known)]
        if len(on):
            known.append(on.quantile(OWN_QUANTILE))
        lengths[image] = min(known)
    return lengths


def _meant(roles: Roles) -> list[set[int]]:
    """Return per image all that its words are meant for: itself, duplicates, others of its words.

    Of these the nearest counts.
    """
    sets = set(roles.own)
    return [set(group).union(*(own for own in sets if not own.isdisjoint(group)))
            for group in roles.groups]  # fmt: skip


def _own(view: View, roles: Roles) -> Tensor:
    """Return [generation image] whether it was asked for, and it or a duplicate is nearest."""
    result = torch.zeros_like(view.generated, dtype=torch.bool)
    for generation, nearest in enumerate(view.generated.argmin(1).tolist()):
        group = roles.groups[nearest]
        if not roles.own[generation].isdisjoint(group):
            result[generation, sorted(group)] = True
    return result


def _standing_out(view: View, roles: Roles, part: Tensor) -> Tensor:
    """Return [generation image] the images that are copied, whatever was asked.

    Near-duplicates are one image. Of few images, the nearest by its yardstick. Else those that
    stand out from the second nearest; the rate is divided among all generations, so that chance
    names `FALSE` of them in an audit, however many there are.
    """
    result = torch.zeros_like(view.generated, dtype=torch.bool)
    groups = sorted({tuple(sorted(group)) for group in roles.groups})
    distances = torch.stack([view.generated[:, list(group)].amin(1) for group in groups], 1)
    ordered, places = distances.sort(1)
    if len(groups) < IMAGES:
        nearest = [list(groups[place]) for place in places[:, 0].tolist()]
        for generation, group in enumerate(nearest):
            result[generation, group] = part[generation, group] < 1
        return result
    dimension, spacings = dimension_of(ordered[:, : neighbours_of(len(groups))])
    if dimension is None:
        return result
    rate = min(RATE, FALSE / max(1, sum(roles.on)))
    limit = min(view.bounds.ratio, ratio_limit(dimension, spacings, rate))
    for generation in (ordered[:, 0] < limit * ordered[:, 1]).nonzero().flatten().tolist():
        result[generation, list(groups[int(places[generation, 0])])] = True
    return result
