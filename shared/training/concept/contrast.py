"""Directions that hold more of one set of vectors than of another."""

import torch

from ...arrays import Float, Tensor

ROUNDING = 1e-10
"""Gains below this share of the concept's energy are rounding."""


def contrast(
    concept: Float[Tensor, "row width"], retained: Float[Tensor, "other width"], price: float
) -> tuple[Float[Tensor, "width rank"], Float[Tensor, " rank"]]:
    """Return orthonormal directions that are worth their price, the best first, and their energy.

    With E = concept^T concept and G = retained^T retained these are the eigenvectors of E - price G
    with positive eigenvalues. Of all subspaces, of any rank, theirs has the largest
    tr V^T (E - price G) V (Ky Fan, 1949).

    Args:
        concept: What the subspace is to hold, in float64; the caller sees to the scale of both.
        retained: What it is to leave alone; without any this is an SVD of `concept`.
        price: Energy of `concept` that a direction must hold for one of `retained`, >= 0.

    Returns:
        Columns V, and of each its energy |concept v|^2.
    """
    rows = torch.cat([concept, retained])
    # All eigenvectors of interest lie in the span of the rows, which may be few among many
    # coordinates: no matrix of width x width is made then.
    span = torch.linalg.qr(rows.T).Q
    inside, outside = concept @ span, retained @ span
    values, vectors = torch.linalg.eigh(inside.T @ inside - price * (outside.T @ outside))
    worth = values > ROUNDING * concept.square().sum()
    vectors = vectors[:, worth].flip(1)
    return span @ vectors, (inside @ vectors).square().sum(0)


def leading(energies: Float[Tensor, " direction"], share: float, total: float, most: int) -> int:
    """Return how many of the first energies reach a share of `total`, `most` at most."""
    reached = energies.cumsum(0) >= share * total * (1 - 1e-12)
    return min(most, len(energies), int((~reached).sum()) + 1)
