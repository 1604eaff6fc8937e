"""The singular directions of what a LoRA changes, and ways along which they are dropped.

"Filtering Memorization from Parameter-Space in Diffusion Models" (Base-Anchored Filtering,
arXiv:2605.10439) keeps directions that align with the principal subspace of the base model's weight
and suppresses the others, without data. Of the paper only the abstract was available; how alignment
is measured and how large the subspace is are ours. `sensitive` weighs directions by gradients, as
"Spectral Surgery" (arXiv:2603.03995) does for language models, here by how far the predictions of
the memorized captions hang on a direction, against those of the captions to be kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ....shared.models.lora.names import Place
from .case import Case, Path
from .predictions import Batch, steering
from .weights import Factors

PRINCIPAL = 8
"""The principal subspace has this part of the dimensions that a weight's smaller side has."""
TINY = 1e-30


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """The singular value decomposition of one module's change B A."""

    u: Tensor
    """[out direction], orthonormal."""
    s: Tensor
    """[direction], falling."""
    v: Tensor
    """[in direction], orthonormal."""

    @classmethod
    def of(cls, up: Tensor, down: Tensor) -> "Directions":
        """Return the decomposition of up @ down, without the product.

        Args:
            up: B [out rank].
            down: A [rank in].
        """
        left, small_left = torch.linalg.qr(up)
        right, small_right = torch.linalg.qr(down.T)
        u, s, v = torch.linalg.svd(small_left @ small_right.T)
        return cls(u=left @ u, s=s, v=right @ v.T)

    def weigh(self, up: Tensor, weights: Tensor) -> Tensor:
        """Return the factor B [out rank] whose directions are multiplied by weights [direction]."""
        return (self.u * weights) @ (self.u.T @ up)


def alignment(directions: Directions, base: Tensor) -> Tensor:
    """Return how far directions lie in the base weight's principal subspace [direction], 0 to 1.

    Both sides count: |U_k^T u| |V_k^T v|, with the leading k singular vectors of `base`.

    Args:
        directions: Of a module.
        base: The weight that it changes [out in].
    """
    k = max(1, min(base.shape) // PRINCIPAL)
    u, _, v = torch.linalg.svd(base, full_matrices=False)
    return (u[:, :k].T @ directions.u).norm(dim=0) * (v[:k] @ directions.v).norm(dim=0)


def filtering(case: Case) -> Path:
    """Return the LoRA without the directions that align least with the base model."""
    found = _directions(case)
    ranks = {place: alignment(d, case.weights.base(place)) for place, d in found.items()}
    return _dropping(case, found, ranks)


def sensitive(case: Case) -> Path:
    """Return the LoRA without the directions on which memorized captions hang most.

    A direction with weight g moves a prediction by its derivative in g. Its square, over all
    numbers of the prediction, is estimated by derivatives of random sums of them (Hutchinson). The
    order is by the ratio of captions to be kept to memorized ones.
    """
    found = _directions(case)
    memorized, held = (_squares(case, found, batches) for batches in
                       (case.memorized[::2], case.held[::2]))  # fmt: skip
    ranks = {place: held[place] / memorized[place].clamp_min(TINY) for place in found}
    return _dropping(case, found, ranks)


def _directions(case: Case) -> dict[Place, Directions]:
    return {
        place: Directions.of(up.flatten(1), case.weights.down(place))
        for place, up in case.weights.original.items()
    }


def _squares(
    case: Case, found: Mapping[Place, Directions], batches: tuple[Batch, ...]
) -> dict[Place, Tensor]:
    """Return per module the mean squared derivative of predictions in each direction's weight."""
    weights, generator = case.weights, torch.Generator().manual_seed(0)
    weights.put(weights.original)
    total = {place: torch.zeros_like(d.s) for place, d in found.items()}
    with case.trained(list(found)) as factors:
        for batch in batches:
            predicted = steering(case.denoiser, batch, graph=True)
            signs = torch.randint(0, 2, predicted.shape, generator=generator).to(predicted) * 2 - 1
            gradients = torch.autograd.grad(
                (predicted * signs).sum(), list(factors.values()), allow_unused=True
            )
            for (place, up), gradient in zip(factors.items(), gradients, strict=True):
                if gradient is not None:
                    u = found[place].u
                    up = up.detach().float().flatten(1)
                    sums = (u.T @ gradient.float().flatten(1)) * (u.T @ up)
                    total[place] += sums.sum(1) ** 2 / len(batches)
    return total


def _dropping(case: Case, found: Mapping[Place, Directions], ranks: Mapping[Place, Tensor]) -> Path:
    """Return the path that drops directions of all modules by rising rank."""
    original = case.weights.original
    every = torch.cat([rank.flatten().cpu() for rank in ranks.values()]).sort().values

    def path(left: float) -> Factors:
        dropped = round((1 - left) * len(every))
        limit = -torch.inf if not dropped else float(every[dropped - 1])
        return {
            place: found[place].weigh(up.flatten(1), (ranks[place] > limit).to(up)).view_as(up)
            for place, up in original.items()
        }

    return path
