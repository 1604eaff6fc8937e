"""From a concept in words to its subspace, accepted on sentences that it was not made from."""

import hashlib
from collections.abc import Sequence

import torch

from ..arrays import Float, Tensor
from .concept import Concept
from .subspace import ConceptSubspace, remove
from .text_states import TextPath, differences, in_batches, token_weights

RESIDUAL = 0.1
"""Largest share of a concept, in held-out sentences, that may lie outside its subspace."""
COLLATERAL = 0.05
"""Largest share of the retained captions that may lie inside it."""
NEGLIGIBLE = 1e-10
"""Singular values below this share of the largest are rounding."""


class ConceptNotSeparable(ValueError):
    """A subspace misses too much of its concept, or takes too much of everything else."""


def fit_subspace(
    text_path: TextPath,
    concepts: Sequence[Concept],
    captions: Sequence[str],
    *,
    energy: float = 0.95,
    cap: int | None = None,
    retained_energy: float = 0.95,
    force: bool = False,
) -> ConceptSubspace:
    """Return the joined subspace of concepts in the states that text-fed layers read.

    The leading directions of everything to be retained are removed from what each concept
    changes; the leading directions of the rest are the concept. Encoders that are joined along
    the width are first brought to the same scale, else the larger one would decide alone.

    Args:
        text_path: The trainer's own.
        concepts: At least one.
        captions: To be retained: the training captions. Those that name a concept are left out.
        energy: Share of each concept's own energy to cover, in (0, 1].
        cap: Most dimensions per concept; None is 16, and 32 from a width of 2048 on.
        retained_energy: Share of the retained states' energy to keep clear of, in [0, 1).
        force: Return the subspace although it fails acceptance; its provenance says so.

    Raises:
        ConceptNotSeparable: On held-out sentences more than `RESIDUAL` of a concept lies outside,
            or more than `COLLATERAL` of the retained captions inside.
    """
    if not concepts:
        raise ValueError("`concepts` must hold at least one concept.")
    if not 0 < energy <= 1 or not 0 <= retained_energy < 1:
        raise ValueError(
            "`energy` must be in (0, 1] and `retained_energy` in [0, 1), "
            f"got {energy} and {retained_energy}."
        )
    kept = [text for text in captions if not any(c.is_named_in(text) for c in concepts)]
    twins = [pair.twin for concept in concepts for pair in concept.pairs(held_out=False)]
    retained, encoders = _retained(text_path, [*kept, *dict.fromkeys(twins)], retained_energy)
    changes = [differences(text_path, concept.pairs(held_out=False)) for concept in concepts]
    width = retained.shape[0]
    most = cap if cap is not None else 16 if width < 2048 else 32
    parts = [_leading(change, retained, encoders, energy, most) for change in changes]
    basis = _orthonormal(torch.cat(parts, dim=1))
    residuals = [
        _residual(differences(text_path, concept.pairs(held_out=True)), basis)
        for concept in concepts
    ]
    collateral = _collateral(text_path, kept or list(dict.fromkeys(twins)), basis)
    faults = [
        f"{residual:.0%} of {concept.names[0]!r} lies outside (at most {RESIDUAL:.0%})"
        for concept, residual in zip(concepts, residuals, strict=True)
        if not residual <= RESIDUAL
    ]
    if not collateral <= COLLATERAL:
        faults.append(f"{collateral:.0%} of other text lies inside (at most {COLLATERAL:.0%})")
    if faults and not force:
        raise ConceptNotSeparable(
            f"The subspace of {basis.shape[1]} dimensions would not do what it promises: "
            f"{'; '.join(faults)}. More names and templates or a larger `cap` lower the first, a "
            "neutral word closer to the concept or a smaller `energy` the second; or force it."
        )
    provenance = {
        "concepts": [{"names": list(c.names), "neutral": c.neutral} for c in concepts],
        "templates": sorted({template for c in concepts for template in c.templates}),
        "captions": {"retained": len(kept), "named a concept": len(captions) - len(kept)},
        "captions_sha256": hashlib.sha256("\n".join(kept).encode()).hexdigest(),
        "encoders": list(encoders),
        "settings": {"energy": energy, "cap": most, "retained_energy": retained_energy},
        "retained_directions": retained.shape[1],
        "ranks": [part.shape[1] for part in parts],
        "residuals": residuals,
        "collateral": collateral,
        "accepted": not faults,
    }
    return ConceptSubspace(basis=basis, provenance=provenance)


def _retained(
    text_path: TextPath, prompts: Sequence[str], energy: float
) -> tuple[Float[Tensor, "width kept"], tuple[int, ...]]:
    """Return the leading directions of all token states, encoder by encoder, and their widths.

    First tokens are included, uncentred: they must be kept clear of. States count by direction
    alone: in some encoders the first token's is so long that it would be all of the energy.
    """
    gram = torch.zeros(())
    for batch in in_batches(text_path, prompts):
        weights = torch.stack([token_weights(row) for row in batch.words])
        encoders = batch.encoders or (batch.states.shape[-1],)
        parts = batch.states.double().cpu().split(list(encoders), dim=-1)
        rows = torch.cat([torch.nn.functional.normalize(part, dim=-1) for part in parts], dim=-1)
        rows = (rows * weights.sqrt()[..., None]).flatten(0, 1)
        gram = gram + rows.T @ rows
    directions = []
    for part in torch.arange(len(gram)).split(list(encoders)):
        values, vectors = torch.linalg.eigh(gram[part][:, part])
        count = _count(values.flip(0).clamp_min(0), energy)
        # Per encoder: directions that stay orthogonal whatever the encoders' scales.
        padded = torch.zeros(len(gram), count, dtype=torch.float64)
        padded[part] = vectors.flip(1)[:, :count]
        directions.append(padded)
    return torch.cat(directions, dim=1), encoders


def _leading(
    change: Float[Tensor, "row width"],
    retained: Float[Tensor, "width kept"],
    encoders: tuple[int, ...],
    energy: float,
    most: int,
) -> Float[Tensor, "width rank"]:
    """Return the directions of a change that reach `energy` outside what is retained."""
    clear = remove(change, retained)
    scale = torch.cat([part.square().mean().sqrt().expand(part.shape[1])
                       for part in clear.split(list(encoders), dim=1)])  # fmt: skip
    if not scale.any():
        return clear.new_zeros(clear.shape[1], 0)
    _, values, vectors = torch.linalg.svd(clear / scale.clamp_min(1e-300), full_matrices=False)
    count = min(most, _count(values.square(), energy))
    # A state x is scale * x' in the scaled space: A x = 0 is needed for the span of scale * v'.
    return vectors[:count].T * scale[:, None]


def _count(energies: Float[Tensor, " direction"], share: float) -> int:
    """Return how many of the leading energies reach a share of their sum; 0 for a share of 0."""
    if share == 0:
        return 0
    reached = energies.cumsum(0) / energies.sum()
    return min(len(energies), int((reached < share * (1 - 1e-12)).sum()) + 1)


def _orthonormal(columns: Float[Tensor, "width column"]) -> Float[Tensor, "width rank"]:
    """Return an orthonormal basis of the span; what concepts share is there once."""
    lengths = columns.norm(dim=0).clamp_min(1e-300)
    left, values, _ = torch.linalg.svd(columns / lengths, full_matrices=False)
    return left[:, values > NEGLIGIBLE * values.max()] if len(values) else columns


def _residual(change: Float[Tensor, "row width"], basis: Float[Tensor, "width rank"]) -> float:
    """Return |(I - V V^T) change|^2 / |change|^2, the share of a concept that is missed."""
    return float(remove(change, basis).square().sum() / change.square().sum())


def _collateral(text_path: TextPath, prompts: Sequence[str], basis: Tensor) -> float:
    """Return the mean over tokens of |V^T h|^2 / |h|^2: first tokens or the rest, the larger.

    The first token is looked at apart, since it is one of many and every prompt needs it.
    """
    totals = torch.zeros(2, 2, dtype=torch.float64)
    for batch in in_batches(text_path, prompts):
        states = batch.states.double().cpu()
        inside = (states @ basis).square().sum(-1) / states.square().sum(-1).clamp_min(1e-300)
        weights = torch.stack([token_weights(row) for row in batch.words])
        for group, places in enumerate((slice(0, 1), slice(1, None))):
            totals[group, 0] += (inside * weights)[:, places].sum()
            totals[group, 1] += weights[:, places].sum()
    return float((totals[:, 0] / totals[:, 1]).max())
