"""The residual score: how much of what a prompt adds lies outside what ordinary prompts add.

Wen et al. (ICLR 2024) measure |D|, all that a prompt adds to the prediction. Ordinary words add
much as well: the name of a colour may move |D| by half without any memorization. What they add
lies in few directions, which the D of control prompts span. Modified: measured is the part of D
outside of them, in pure noise of which the network is told that it is less noisy.

At which told level memorized prompts stand out depends on the network. So starting noises take
turns at two levels, and a residual counts in units of what controls have at the same noise:

    score = exp(z / 2),  z = (log residual - median of the controls' logs) / their median deviation

which is 1 for an ordinary prompt. The mean of the scores over noises is the likelihood ratio of a
mixture, up to a constant factor of each: that z is raised by a fixed amount at one of the noises,
whichever it is. So a level that tells nothing of a network takes little away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..arrays import Float, Tensor
from .rates import NotEnoughControls
from .robust import median_and_deviation

TOLD = (0.28, 0.9)
"""Shares of the schedule that are behind where the network is told to be, while it reads pure
noise: timesteps 701 and 81 of 1000. Starting noises take turns."""
DEVIATION = 1e-3
"""Least deviation of logarithms that counts: controls that are all alike would make any number."""
TINY = 1e-30
"""Least residual that counts: 0 has no logarithm."""
GREATEST = 60.0
"""Logarithm of the greatest score: float32 ends at 88."""
FOLDS = 10
"""Parts of the controls; each part is scored by the directions of the others."""
CONTROLS_A_DIRECTION = 6
MOST_DIRECTIONS = 32
OUTLYING = 5.0
"""Controls whose log residual lies more than so many median deviations above the median span no
direction: one that is near a memorized prompt would hide it, since its D points the same way."""


def directions_for(controls: int) -> int:
    """Return how many directions so many controls carry."""
    return max(1, min(MOST_DIRECTIONS, controls // CONTROLS_A_DIRECTION))


def require_direction(controls: int) -> None:
    """Make sure that so many controls carry a direction.

    Raises:
        NotEnoughControls: They do not.
    """
    if controls < CONTROLS_A_DIRECTION:
        raise NotEnoughControls(
            f"a residual score needs at least {CONTROLS_A_DIRECTION} controls, found {controls}. "
            "Add controls, or take --score magnitude."
        )


def told_steps(seeds: int, schedule_steps: int) -> tuple[int, ...]:
    """Return the step of a schedule whose level the network is told, one a starting noise."""
    last = schedule_steps - 1
    return tuple(min(last, round(TOLD[seed % len(TOLD)] * schedule_steps)) for seed in range(seeds))


WIDENED = 8192
"""Elements that are taken to float64 at a time."""
TENSORS = ("mean", "directions", "median", "deviation")
"""Of a basis, by their names in a file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlBasis:
    """What ordinary prompts add to the prediction, at given starting noises and noise levels."""

    steps: tuple[int, ...]
    """[seed] Which noise level of the schedule, from 0: the network is told it and reads pure
    noise."""
    mean: Float[Tensor, " seed element"]
    """Mean D of the controls, float32."""
    directions: Float[Tensor, " seed direction element"]
    """Orthonormal rows: the leading right singular vectors of the controls' D about its mean."""
    median: Float[Tensor, " seed"]
    """Of the logarithms of the controls' residuals, float64."""
    deviation: Float[Tensor, " seed"]
    """Their median distance from it, above 0, float64."""

    @classmethod
    def fit(
        cls, differences: Float[Tensor, " seed control element"], count: int, steps: Sequence[int]
    ) -> "ControlBasis":
        """Return the basis that controls span, whose scores are the residuals as they are.

        Args:
            differences: D of every control at every starting noise.
            count: Directions, below the number of controls.
            steps: Where the differences were measured, one a starting noise.
        """
        means, directions = [], []
        for rows in differences:
            rows = rows.double()
            mean = rows.mean(0)
            rows = rows - mean
            # The Gram matrix of controls is small; the matrix of elements is not.
            values, vectors = torch.linalg.eigh(rows @ rows.T)
            leading, scales = vectors[:, -count:].flip(1), values[-count:].flip(0)
            floor = torch.finfo(torch.float64).eps * len(rows) * values[-1].clamp(min=0)
            # Directions in which no control differs are none: rows of zeros take nothing away.
            inverse = torch.where(scales > floor, scales.clamp(min=0).rsqrt(), 0.0)
            means.append(mean.float())
            directions.append(((leading * inverse).T @ rows).float())
        return cls(
            steps=tuple(steps), mean=torch.stack(means), directions=torch.stack(directions),
            median=torch.zeros(len(means), dtype=torch.float64),
            deviation=torch.full((len(means),), 0.5, dtype=torch.float64),
        )  # fmt: skip

    def in_units_of(self, residuals: Float[Tensor, " control seed"]) -> "ControlBasis":
        """Return the basis whose scores are in units of what the controls have.

        Args:
            residuals: From `cross_fitted`.
        """
        logs = residuals.clamp_min(TINY).log()
        median, deviation = median_and_deviation(logs, DEVIATION)
        return replace(self, median=median, deviation=deviation)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the tensors as a safetensors file holds them, their names prefixed."""
        named = {name: getattr(self, name) for name in TENSORS}
        return {prefix + name: tensor.contiguous() for name, tensor in named.items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], steps: Sequence[int], prefix: str = ""
    ) -> "ControlBasis":
        """Return what `tensors` was made from."""
        return cls(steps=tuple(steps), **{name: tensors[prefix + name] for name in TENSORS})

    def to(self, device: torch.device) -> "ControlBasis":
        """Return the basis on another device."""
        return replace(self, mean=self.mean.to(device), directions=self.directions.to(device))

    def outside(
        self, differences: Float[Tensor, " row *latent"], seeds: Sequence[int]
    ) -> Float[Tensor, " row element"]:
        """Return D - mean outside the directions: what a prompt adds and controls do not.

        Args:
            differences: D of each row.
            seeds: Index into the basis's starting noises, one a row.
        """
        rows, index = differences.flatten(1).to(self.mean.dtype), list(seeds)
        if len(self.mean) == 1:  # without an index, for which a device would be waited
            rows = rows - self.mean
            return rows - rows @ self.directions[0].T @ self.directions[0]
        rows = rows - self.mean[index]
        inside = torch.einsum("re,rke->rk", rows, self.directions[index])
        return rows - torch.einsum("rk,rke->re", inside, self.directions[index])

    def residual(
        self, differences: Float[Tensor, " row *latent"], seeds: Sequence[int]
    ) -> Float[Tensor, " row"]:
        """Return the L2 norm of `outside` (latent units, >= 0); the arguments are the same."""
        return torch.linalg.vector_norm(self.outside(differences, seeds), dim=1)

    def scores(
        self, residuals: Float[Tensor, " row"], seeds: Sequence[int]
    ) -> Float[Tensor, " row"]:
        """Return residuals as scores (>= 0; 1 where they are the controls' median), float64.

        Args:
            residuals: From `residual`, on the CPU.
            seeds: As for `outside`.
        """
        index = list(seeds)
        logs = residuals.double().clamp_min(TINY).log()
        z = (logs - self.median[index]) / self.deviation[index]
        return (z / 2).clamp_max(GREATEST).exp()


def folds(number: int) -> tuple[Tensor, ...]:
    """Return the indices of so many controls in `FOLDS` runs of the list.

    Lists keep related prompts together ("hotel on orange dots", "hotel on green dots"). A control
    that was scored by directions that its neighbour made would score lower than a prompt that has
    no neighbour among the controls: thresholds for 1 % then flagged 4 % on one model.
    """
    return torch.arange(number).tensor_split(min(FOLDS, number))


def inner_products(differences: Float[Tensor, " row element"]) -> Float[Tensor, " row row"]:
    """Return the inner product of each D with each other, float64."""
    products = torch.zeros(len(differences), len(differences), dtype=torch.float64)
    for part in differences.split(WIDENED, dim=1):
        wide = part.double()
        products += wide @ wide.T
    return products


def residuals_of(
    products: Float[Tensor, " row row"], made: Tensor, scored: Tensor, count: int
) -> Float[Tensor, " scored"]:
    """Return what `ControlBasis.residual` would, from inner products alone, float64.

    Args:
        products: From `inner_products`.
        made: Which rows make the basis, bool [row].
        scored: Indices of the rows that are scored.
        count: Directions.
    """
    within, across = products[made][:, made], products[scored][:, made]
    mean = within.mean(0)  # inner products with the mean, and of the mean with itself:
    square = mean.mean()
    values, vectors = torch.linalg.eigh(within - mean - mean[:, None] + square)
    leading, scales = vectors[:, -count:], values[-count:]
    floor = torch.finfo(torch.float64).eps * len(within) * values[-1].clamp(min=0)
    inverse = torch.where(scales > floor, scales.clamp(min=0).rsqrt(), 0.0)
    centred = across - across.mean(1, keepdim=True) - mean + square
    inside = centred @ leading * inverse
    norms = products.diagonal()[scored] - 2 * across.mean(1) + square
    return (norms - inside.square().sum(1)).clamp(min=0).sqrt()


def cross_fitted(
    products: Float[Tensor, " seed control control"], count: int, spanning: Tensor | None = None
) -> Float[Tensor, " control seed"]:
    """Return each control's residual by a basis that it did not make, float64.

    In a basis that they span themselves controls score too low, and a threshold from such scores
    flags .08 to .13 of ordinary prompts where .01 is asked for. All that is needed of the D is
    their inner products, whose number does not grow with the size of the latents.

    Args:
        products: From `inner_products`, one matrix a starting noise.
        count: Directions.
        spanning: Which controls may make a basis, bool [control]; None for all.
    """
    seeds, number = products.shape[:2]
    scores = torch.zeros(number, seeds, dtype=torch.float64)
    for held in folds(number):
        others = torch.ones(number, dtype=torch.bool) if spanning is None else spanning.clone()
        others[held] = False
        for seed in range(seeds):
            scores[held, seed] = residuals_of(products[seed], others, held, count)
    return scores


def ordinary(scores: Float[Tensor, " control seed"]) -> Tensor:
    """Return which controls are ordinary enough to span directions, bool [control].

    Args:
        scores: Residuals from `cross_fitted`.
    """
    # In units of each noise: a level with large residuals, or with scattered ones, counts no more.
    logs = scores.clamp_min(TINY).log()
    median, deviation = median_and_deviation(logs, DEVIATION)
    logs = ((logs - median) / deviation).mean(1)
    median, deviation = median_and_deviation(logs)
    return logs <= median + OUTLYING * deviation


def fit_controls(
    differences: Float[Tensor, " seed control element"], count: int, steps: Sequence[int]
) -> tuple[ControlBasis, Float[Tensor, " control seed"]]:
    """Return the basis that the ordinary controls span, and all controls' cross-fitted scores.

    Args:
        differences: D of every control at every starting noise.
        count: Directions.
        steps: Where the differences were measured, one a starting noise.
    """
    products = torch.stack([inner_products(rows) for rows in differences])
    spanning = ordinary(cross_fitted(products, count))
    residuals = cross_fitted(products, count, spanning)
    basis = ControlBasis.fit(differences[:, spanning], count, steps).in_units_of(residuals)
    scores = [basis.scores(own, [seed] * len(own)) for seed, own in enumerate(residuals.T)]
    return basis, torch.stack(scores, dim=1)
