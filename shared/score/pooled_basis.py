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
from .control_basis import (
    ControlBasis,
    directions_for,
    folds,
    inner_products,
    ordinary,
    residuals_of,
)

POOLED_SEEDS = 4
"""Starting noises that are pooled, at most: directions hardly change beyond, fits grow dear."""


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
    seeds, number = differences.shape[:2]
    products = inner_products(differences.flatten(0, 1)).view(seeds, number, seeds, number)
    count = directions_for(number)
    spanning = ordinary(pooled_cross_fitted(products, count))
    rows = differences[:, spanning].flatten(0, 1)
    basis = ControlBasis.fit(rows[None], count, [0])
    return basis, pooled_cross_fitted(products, count, spanning)


def pooled_cross_fitted(
    products: Float[Tensor, " seed control seed control"],
    count: int,
    spanning: Tensor | None = None,
) -> Float[Tensor, " control seed"]:
    """Return each control's residual by a basis of the other folds at the other seeds, float64.

    Args:
        products: Inner products of all D.
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
            scores[held, seed] = residuals_of(flat, made.flatten(), seed * number + held, count)
    return scores
