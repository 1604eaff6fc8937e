"""From a concept in words to its subspace, accepted on sentences that it was not fitted to."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...arrays import Float, Tensor
from .concept import Concept
from .subspace import ConceptSubspace, contrast, leading, remove
from .text_states import TextPath, differences, in_batches, token_weights

RESIDUAL = 0.1
"""Largest share of a concept, in held-out sentences, that may lie outside its subspace."""
COLLATERAL = 0.05
"""Largest share of the retained captions that may lie inside it."""
PRICE = RESIDUAL / COLLATERAL
"""Shares of a concept that one share of retained text is worth, where both limits bind."""
NEGLIGIBLE = 1e-10
"""Singular values below this share of the largest are rounding."""


class ConceptNotSeparable(ValueError):
    """A subspace misses too much of its concept, or takes too much of everything else."""


@dataclass(frozen=True, kw_only=True)
class RetainedEnergy:
    """Where the states of ordinary prompts lie, each state at length 1."""

    first: Tensor
    """[width width], mean of h h^T / |h|^2 over first tokens: one of many, but of every prompt."""
    rest: Tensor
    """[width width], the same over all others; the padding of a prompt counts as one."""


def fit_subspace(
    text_path: TextPath,
    concepts: Sequence[Concept],
    captions: Sequence[str],
    *,
    energy: float = 0.95,
    cap: int | None = None,
    price: float = PRICE,
    force: bool = False,
) -> ConceptSubspace:
    """Return the joined subspace of concepts in the states that text-fed layers read.

    A direction is the concept's when it holds more of what the concept changes, as a share, than
    `price` times what it holds of the retained text: see `contrast`. At the default price the two
    acceptance limits weigh the same. (Removing the directions of 95 % of the retained energy first
    and taking the SVD of the rest misses most of a concept in the states of a real sentence
    encoder: `make bench NAME=trainers ARGS="--only subspace"` measures both.)

    Encoders that are joined along the width are first brought to the same scale, else the larger
    one would decide alone.

    Args:
        text_path: The trainer's own.
        concepts: At least one.
        captions: To be retained: the training captions. Those that name a concept are left out.
        energy: Share of each concept's energy at which to stop, in (0, 1].
        cap: Most dimensions per concept; None is 16, and 32 from a width of 2048 on.
        price: Of retained text; 0 takes the leading directions of the concept alone.
        force: Return the subspace although it fails acceptance; its provenance says so.

    Raises:
        ConceptNotSeparable: On held-out sentences more than `RESIDUAL` of a concept lies outside,
            or more than `COLLATERAL` of the retained captions inside.
    """
    if not concepts:
        raise ValueError("`concepts` must hold at least one concept.")
    if not 0 < energy <= 1 or not price >= 0 or (cap is not None and cap < 1):
        raise ValueError(
            "`energy` must be in (0, 1], `price` at least 0 and `cap` at least 1, "
            f"got {energy}, {price} and {cap}."
        )
    kept = [text for text in captions if not any(c.is_named_in(text) for c in concepts)]
    twins = list(dict.fromkeys(p.twin for c in concepts for p in c.pairs(holdout=False)))
    changes = [differences(text_path, concept.pairs(holdout=False)) for concept in concepts]
    for concept, change in zip(concepts, changes, strict=True):
        if not change.any():
            raise ConceptNotSeparable(
                f"The text encoder reads {concept.names[0]!r} exactly as {concept.neutral!r}."
            )
    encoders = text_path(twins[:1]).encoders or (changes[0].shape[1],)
    scale = _scale(torch.cat(changes), encoders)
    retained = _rows(retained_energy(text_path, [*kept, *twins], scale))
    most = cap if cap is not None else 16 if len(scale) < 2048 else 32
    parts = []
    for change in (change / scale for change in changes):
        directions, energies = contrast(change / change.norm(), retained, price)
        parts.append(directions[:, : leading(energies, energy, 1.0, most)])
    # A state x is scale * x' in the scaled space: A x = 0 is needed for the span of scale * v'.
    basis = _orthonormal(torch.cat(parts, dim=1) * scale[:, None])
    provenance = {
        "concepts": [{"names": list(c.names), "neutral": c.neutral} for c in concepts],
        "templates": list(dict.fromkeys(template for c in concepts for template in c.templates)),
        "captions": {"retained": len(kept), "named a concept": len(captions) - len(kept)},
        "captions_sha256": hashlib.sha256("\n".join(kept).encode()).hexdigest(),
        "encoders": list(encoders),
        "settings": {"energy": energy, "cap": most, "price": price},
        "ranks": [part.shape[1] for part in parts],
    } | _accept(text_path, concepts, retained_energy(text_path, kept or twins), basis, force)
    return ConceptSubspace(basis=basis, provenance=provenance)


def retained_energy(
    text_path: TextPath, prompts: Sequence[str], scale: Float[Tensor, " width"] | None = None
) -> RetainedEnergy:
    """Return the energy of the states of prompts.

    Args:
        text_path: From prompts to states.
        prompts: At least one.
        scale: What each coordinate is divided by before lengths are taken; None for nothing.
    """
    sums, totals = [torch.zeros(()), torch.zeros(())], [0.0, 0.0]
    for batch in in_batches(text_path, prompts):
        states = batch.states.cpu().double()
        states = states if scale is None else states / scale
        # In some encoders the first token's state is so long that it would be all of the energy.
        units = torch.nn.functional.normalize(states, dim=-1)
        weights = torch.stack([token_weights(row) for row in batch.words])
        rows = units * weights.sqrt()[..., None]
        for group, places in enumerate((slice(0, 1), slice(1, None))):
            some = rows[:, places].flatten(0, 1)
            sums[group] = sums[group] + some.T @ some
            totals[group] += float(weights[:, places].sum())
    first, rest = (each / max(total, 1e-300) for each, total in zip(sums, totals, strict=True))
    return RetainedEnergy(first=first, rest=rest)


def residual(change: Float[Tensor, "row width"], basis: Float[Tensor, "width rank"]) -> float:
    """Return |(I - V V^T) change|^2 / |change|^2, the share of a concept that is missed.

    Where nothing changes, nothing is missed: 0.
    """
    total = change.square().sum().clamp_min(1e-300)
    return float(remove(change, basis).square().sum() / total)


def collateral(retained: RetainedEnergy, basis: Float[Tensor, "width rank"]) -> float:
    """Return the mean of |V^T h|^2 / |h|^2, over first tokens or over the rest, the larger."""
    return max(float((basis * (each @ basis)).sum()) for each in (retained.first, retained.rest))


def separable(change: Float[Tensor, "row width"], retained: RetainedEnergy) -> bool:
    """Return whether residual and collateral could both be within their limits for some subspace.

    False is a proof: min over all V of residual + PRICE collateral is 1 minus the sum of the
    positive eigenvalues of E - PRICE G, and it is above what both limits allow together.
    """
    energy = change.T @ change / change.square().sum()
    gains = torch.linalg.eigvalsh(energy - PRICE * retained.rest).clamp_min(0)
    return float(1 - gains.sum()) <= RESIDUAL + PRICE * COLLATERAL


def _accept(
    text_path: TextPath,
    concepts: Sequence[Concept],
    retained: RetainedEnergy,
    basis: Float[Tensor, "width rank"],
    force: bool,
) -> dict[str, Any]:
    """Return how a subspace does on held-out sentences; see `fit_subspace`."""
    changes = [differences(text_path, concept.pairs(holdout=True)) for concept in concepts]
    residuals = [residual(change, basis) for change in changes]
    inside = collateral(retained, basis)
    names = [concept.names[0] for concept in concepts]
    faults = [
        f"{missed:.0%} of {name!r} lies outside (at most {RESIDUAL:.0%})"
        for name, missed in zip(names, residuals, strict=True)
        if not missed <= RESIDUAL
    ]
    if not inside <= COLLATERAL:
        faults.append(f"{inside:.0%} of other text lies inside (at most {COLLATERAL:.0%})")
    hopeless = [
        name for name, change in zip(names, changes, strict=True) if not separable(change, retained)
    ]
    if faults and not force:
        advice = (
            f"No subspace of this text encoder, of any rank, would pass for {hopeless[0]!r}: it "
            "reads these sentences with the same directions as the retained captions. A neutral "
            "word closer to the concept can change that; or force it, and rely on the numbers."
            if hopeless
            else "More names and templates or a larger `cap` lower the first, a neutral word "
            "closer to the concept or a smaller `energy` the second; or force it."
        )
        raise ConceptNotSeparable(
            f"The subspace of {basis.shape[1]} dimensions would not do what it promises: "
            f"{'; '.join(faults)}. {advice}"
        )
    return {
        "residuals": residuals,
        "collateral": inside,
        "limits": {"residual": RESIDUAL, "collateral": COLLATERAL},
        "not_separable": hopeless,
        "accepted": not faults,
    }


def _scale(change: Float[Tensor, "row width"], encoders: Sequence[int]) -> Float[Tensor, " width"]:
    """Return the size of the concepts' changes in each encoder, for each of its coordinates."""
    parts = change.split(list(encoders), dim=1)
    scale = torch.cat([part.square().mean().sqrt().expand(part.shape[1]) for part in parts])
    return torch.where(scale > 0, scale, 1.0)


def _rows(retained: RetainedEnergy) -> Float[Tensor, "width width"]:
    """Return rows whose energy is that of first tokens plus that of the rest."""
    values, vectors = torch.linalg.eigh(retained.first + retained.rest)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def _orthonormal(columns: Float[Tensor, "width column"]) -> Float[Tensor, "width rank"]:
    """Return an orthonormal basis of the span; what concepts share is there once."""
    lengths = columns.norm(dim=0).clamp_min(1e-300)
    left, values, _ = torch.linalg.svd(columns / lengths, full_matrices=False)
    return left[:, values > NEGLIGIBLE * values.max()] if len(values) else columns
