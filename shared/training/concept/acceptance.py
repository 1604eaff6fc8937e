"""Whether a subspace holds its concept and leaves other text alone: two numbers, two limits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...arrays import Float, Tensor
from .subspace import remove
from .text_states import TextPath, in_batches, token_weights

RESIDUAL = 0.1
"""Largest share of a concept, in held-out sentences, that may lie outside its subspace."""
COLLATERAL = 0.05
"""Largest share of the retained captions that may lie inside it."""
PRICE = RESIDUAL / COLLATERAL
"""Shares of a concept that one share of retained text is worth, where both limits bind."""


@dataclass(frozen=True, kw_only=True)
class RetainedEnergy:
    """Where the states of ordinary prompts lie, each state at length 1."""

    first: Tensor
    """[width width], mean of h h^T / |h|^2 over first tokens: one of many, but of every prompt."""
    rest: Tensor
    """[width width], the same over all others; the padding of a prompt counts as one."""


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
        states = batch.states.double().cpu()
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
