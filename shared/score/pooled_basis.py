"""What ordinary prompts add at any starting noise: a basis of their D at several, pooled.

An image has the starting noise that its sampler drew, and no control was measured there. At the
first level of a sampler that hardly matters: what ordinary words add lies in nearly the same
directions at every noise. So the D of all controls at all seeds make one basis, and a control is
scored by a basis of *other* controls at *other* seeds, as an image will be.

All of it but the basis itself follows from the inner products of the D, whose number does not grow
with the size of the latents.
"""

import torch

from ..arrays import Float, Tensor
from .control_basis import ControlBasis, directions_for, folds, ordinary

POOLED_SEEDS = 4
"""Starting noises that are pooled, at most: directions hardly change beyond, fits grow dear."""
WIDENED = 8192
"""Elements that are taken to float64 at a time."""


def pooled(
    differences: Float[Tensor, " seed control element"],
) -> tuple[ControlBasis, Float[Tensor, " control pooled"]]:
    """Return the basis that controls span at all seeds together, and their residuals, float64.

    The basis has one mean and one group of directions, with index 0, for every starting noise.
    Controls that stand out span no direction, as in a basis of single seeds.

    Args:
        differences: D of every control at two seeds or more; the first `POOLED_SEEDS` count.
    """
    differences = differences[:POOLED_SEEDS]
    count, products = directions_for(differences.shape[1]), inner_products(differences)
    spanning = ordinary(pooled_cross_fitted(products, count))
    rows = differences[:, spanning].flatten(0, 1)
    basis = ControlBasis.fit(rows[None], count, [0])
    return basis, pooled_cross_fitted(products, count, spanning)


def inner_products(
    differences: Float[Tensor, " seed control element"],
) -> Float[Tensor, " seed control seed control"]:
    """Return the inner product of each D with each other, float64."""
    seeds, number, _ = differences.shape
    products = torch.zeros(seeds * number, seeds * number, dtype=torch.float64)
    for part in differences.flatten(0, 1).split(WIDENED, dim=1):
        wide = part.double()
        products += wide @ wide.T
    return products.view(seeds, number, seeds, number)


def pooled_cross_fitted(
    products: Float[Tensor, " seed control seed control"],
    count: int,
    spanning: Tensor | None = None,
) -> Float[Tensor, " control seed"]:
    """Return each control's residual by a basis of the other folds at the other seeds, float64.

    Args:
        products: From `inner_products`.
        count: Directions.
        spanning: Which controls may make a basis, bool [control]; None for all.
    """
    seeds, number = products.shape[:2]
    flat = products.reshape(seeds * number, seeds * number)
    scores = torch.zeros(number, seeds, dtype=torch.float64)
    for held in folds(number):
        others = torch.ones(number, dtype=torch.bool) if spanning is None else spanning.clone()
        others[held] = False
        for seed in range(seeds):
            made = others.repeat(seeds, 1)
            made[seed] = False
            made, scored = made.flatten(), seed * number + held
            scores[held, seed] = residuals_of(
                flat[made][:, made], flat[scored][:, made], flat.diagonal()[scored], count
            )
    return scores


def residuals_of(
    within: Float[Tensor, " fitted fitted"],
    across: Float[Tensor, " row fitted"],
    own: Float[Tensor, " row"],
    count: int,
) -> Float[Tensor, " row"]:
    """Return what `ControlBasis.residual` would, from inner products alone, float64.

    Args:
        within: Of the D that make the basis.
        across: Of the D that are scored with these.
        own: Of the D that are scored with themselves.
        count: Directions.
    """
    mean = within.mean(0)  # inner products with the mean, and of the mean with itself:
    square = mean.mean()
    values, vectors = torch.linalg.eigh(within - mean - mean[:, None] + square)
    leading, scales = vectors[:, -count:], values[-count:]
    floor = torch.finfo(torch.float64).eps * len(within) * values[-1].clamp(min=0)
    inverse = torch.where(scales > floor, scales.clamp(min=0).rsqrt(), 0.0)
    centred = across - across.mean(1, keepdim=True) - mean + square
    inside = centred @ leading * inverse
    norms = own - 2 * across.mean(1) + square
    return (norms - inside.square().sum(1)).clamp(min=0).sqrt()
