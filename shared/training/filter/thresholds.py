"""From which text-conditional magnitude on a training sample counts as being memorized."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from ...arrays import Float, Tensor

TAIL_KNOWN = 8
"""Scores from which on a bin's quantile tells where its tail begins."""


@runtime_checkable
class Threshold(Protocol):
    """What the filter asks, and tells, once a step."""

    relative: ClassVar[bool]
    """Whether it is compared with `Expectation.ratios` instead of scores."""

    def at(self, timesteps: Tensor) -> Tensor:
        """Return the threshold of each sample, infinity for none, [sample]."""

    def tail(self, timesteps: Tensor) -> Tensor:
        """Return above which scores move it when it learns them, infinity for none, [sample]."""

    def learn(self, timesteps: Tensor, scores: Tensor) -> None:
        """Take in the scores of a step, of all processes, in any order."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""


@dataclass(frozen=True)
class AbsoluteThreshold:
    """One number for all timesteps. Wen et al. took 2 (L2 norm) for full fine-tuning of SD 1.4."""

    relative: ClassVar[bool] = False

    value: float
    """In the unit of the filter; infinity lets everything through."""

    def __post_init__(self):
        if not self.value >= 0:
            raise ValueError(f"`value` must be at least 0, got {self.value}.")

    def at(self, timesteps: Float[Tensor, " sample"]) -> Float[Tensor, " sample"]:
        """Return the number for every sample."""
        return torch.full_like(timesteps, self.value)

    def tail(self, timesteps: Float[Tensor, " sample"]) -> Float[Tensor, " sample"]:
        """Return infinity: it stays what it is."""
        return torch.full_like(timesteps, math.inf)

    def learn(self, timesteps: Tensor, scores: Tensor) -> None:
        """Learn nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the number is a setting."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing in."""


@dataclass(frozen=True)
class RelativeThreshold:
    """So many times what the median caption scores at like timesteps.

    Judged over a caption's latest visits, so that the noise of a single one decides nothing, and
    the same for every model, resolution and state of a training.
    """

    relative: ClassVar[bool] = True

    ratio: float
    """Above 1."""

    def __post_init__(self):
        if not 1 < self.ratio < math.inf:
            raise ValueError(f"`ratio` must be above 1, got {self.ratio}.")

    def at(self, timesteps: Float[Tensor, " sample"]) -> Float[Tensor, " sample"]:
        """Return the ratio for every sample."""
        return torch.full_like(timesteps, self.ratio)

    def tail(self, timesteps: Float[Tensor, " sample"]) -> Float[Tensor, " sample"]:
        """Return infinity: it stays what it is."""
        return torch.full_like(timesteps, math.inf)

    def learn(self, timesteps: Tensor, scores: Tensor) -> None:
        """Learn nothing: the filter's expectation does."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the ratio is a setting."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing in."""


@dataclass
class RunningQuantile:
    """A quantile of the latest scores in each bin of timesteps, since scores move with them."""

    relative: ClassVar[bool] = False

    quantile: float = 0.95
    """Share of samples that pass, in (0, 1)."""
    bins: int = 10
    """Of equal width over `span`."""
    span: tuple[float, float] = (0.0, 1000.0)
    """Lowest and highest timestep of the training; what lies outside counts to the last bin."""
    warmup: int = 64
    """Scores a bin must hold before it stops anything."""
    window: int = 1024
    """Latest scores a bin remembers."""
    scores: list[list[float]] = field(default_factory=list, repr=False)
    """Per bin, oldest first."""

    def __post_init__(self):
        if not 0 < self.quantile < 1:
            raise ValueError(f"`quantile` must be between 0 and 1, got {self.quantile}.")
        if self.bins < 1 or not self.span[0] < self.span[1]:
            raise ValueError(f"`bins` must be at least 1 and `span` rising, got {self}.")
        if not 1 <= self.warmup <= self.window:
            raise ValueError(
                f"`warmup` must be from 1 to `window`, got {self.warmup} and {self.window}."
            )
        self.scores = self.scores or [[] for _ in range(self.bins)]

    def at(self, timesteps: Float[Tensor, " sample"]) -> Float[Tensor, " sample"]:
        """Return the quantile of each sample's bin, infinity while it is warming up."""
        return self._quantiles(timesteps, self.warmup)

    def tail(self, timesteps: Float[Tensor, " sample"]) -> Float[Tensor, " sample"]:
        """Return the quantile of each sample's bin, also while it is warming up."""
        return self._quantiles(timesteps, TAIL_KNOWN)

    def _quantiles(self, timesteps: Tensor, least: int) -> Tensor:
        """Return the quantile of each sample's bin, infinity where it holds fewer scores."""
        limits = [
            math.inf
            if len(scores) < least
            else float(torch.tensor(scores, dtype=torch.float64).quantile(self.quantile))
            for scores in self.scores
        ]
        return timesteps.new_tensor(limits)[self._bins(timesteps)]

    def learn(self, timesteps: Float[Tensor, " sample"], scores: Float[Tensor, " sample"]) -> None:
        """Take in a step; sorted, so that the order of samples and processes says nothing."""
        pairs = zip(self._bins(timesteps).tolist(), scores.tolist(), strict=True)
        for place, score in sorted(pair for pair in pairs if math.isfinite(pair[1])):
            self.scores[place].append(score)
        self.scores = [scores[-self.window :] for scores in self.scores]

    def _bins(self, timesteps: Tensor) -> Tensor:
        low, high = self.span
        return ((timesteps - low) / (high - low) * self.bins).long().clamp(0, self.bins - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered scores."""
        return {"scores": [list(scores) for scores in self.scores]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the scores of another run of the same settings.

        Raises:
            ValueError: It had another number of bins.
        """
        if len(state["scores"]) != self.bins:
            raise ValueError(f"`bins` was {len(state['scores'])} before, is {self.bins} now.")
        self.scores = [list(scores) for scores in state["scores"]]
