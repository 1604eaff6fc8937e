"""From which text-conditional magnitude on a training sample counts as being memorized."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from ...arrays import Float, Tensor

TAIL_KNOWN = 8
"""Scores that a bin must hold before its quantile says where its tail begins."""


@runtime_checkable
class Threshold(Protocol):
    """Decides from which score on a sample is being memorized; the filter calls it every step."""

    relative: ClassVar[bool]
    """True compares the threshold with `Expectation.ratios`, False with scores."""

    def at(self, timesteps: Tensor) -> Tensor:
        """Return the threshold of each sample, infinity where there is none, [sample]."""

    def tail(self, timesteps: Tensor) -> Tensor:
        """Return from which score on a new one moves the threshold, [sample]; infinity for none."""

    def learn(self, timesteps: Tensor, scores: Tensor) -> None:
        """Learn the scores of a step, those of all processes, in any order."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""


@dataclass(frozen=True)
class Fixed:
    """One number for all timesteps, which no score moves."""

    value: float

    def at(self, timesteps: Float[Tensor, " sample"]) -> Float[Tensor, " sample"]:
        """Return the number for every sample."""
        return torch.full_like(timesteps, self.value)

    def tail(self, timesteps: Float[Tensor, " sample"]) -> Float[Tensor, " sample"]:
        """Return infinity."""
        return torch.full_like(timesteps, math.inf)

    def learn(self, timesteps: Tensor, scores: Tensor) -> None:
        """Learn nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: all is in the settings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load nothing."""


@dataclass(frozen=True)
class AbsoluteThreshold(Fixed):
    """Text-conditional magnitude, RMS per latent element; infinity lets everything through.

    Wen et al. took 2 (L2 norm) for full fine-tuning of SD 1.4.
    """

    relative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.value >= 0:
            raise ValueError(f"`value` must be at least 0, got {self.value}.")


@dataclass(frozen=True)
class RelativeThreshold(Fixed):
    """A multiple, above 1, of the median caption's score at like timesteps.

    It is compared with the latest visits of a caption together, so the noise of a single visit
    decides nothing, and it holds for every model, resolution and state of a training.
    """

    relative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 < self.value < math.inf:
            raise ValueError(f"`ratio` must be above 1, got {self.value}.")


@dataclass
class RunningQuantile:
    """A quantile of the latest scores in each bin of timesteps, since scores move with them."""

    relative: ClassVar[bool] = False

    quantile: float = 0.95
    """Share of samples that pass, in (0, 1)."""
    bins: int = 10
    """Of equal width over `span`."""
    span: tuple[float, float] = (0.0, 1000.0)
    """Lowest and highest timestep of the training; one outside falls into the nearest bin."""
    warmup: int = 64
    """Scores that a bin must hold before it stops a sample."""
    window: int = 1024
    """Latest scores that a bin remembers."""
    scores: list[list[float]] = field(default_factory=list, repr=False)
    """Per bin, oldest first."""

    def __post_init__(self) -> None:
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
        """Return the quantile of each sample's bin, infinity while the bin is warming up."""
        return self._quantiles(timesteps, self.warmup)

    def tail(self, timesteps: Float[Tensor, " sample"]) -> Float[Tensor, " sample"]:
        """Return the quantile of each sample's bin, from `TAIL_KNOWN` scores on."""
        return self._quantiles(timesteps, TAIL_KNOWN)

    def learn(self, timesteps: Float[Tensor, " sample"], scores: Float[Tensor, " sample"]) -> None:
        """Learn a step's scores; sorted, so that the order of samples and processes is lost."""
        pairs = zip(self._bins(timesteps).tolist(), scores.tolist(), strict=True)
        for place, score in sorted(pair for pair in pairs if math.isfinite(pair[1])):
            self.scores[place].append(score)
        self.scores = [scores[-self.window :] for scores in self.scores]

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

    def _quantiles(self, timesteps: Tensor, least: int) -> Tensor:
        """Return the quantile of each sample's bin, infinity where it holds fewer scores."""
        limits = [
            math.inf
            if len(scores) < least
            else float(torch.tensor(scores, dtype=torch.float64).quantile(self.quantile))
            for scores in self.scores
        ]
        return timesteps.new_tensor(limits)[self._bins(timesteps)]

    def _bins(self, timesteps: Tensor) -> Tensor:
        low, high = self.span
        return ((timesteps - low) / (high - low) * self.bins).long().clamp(0, self.bins - 1)
