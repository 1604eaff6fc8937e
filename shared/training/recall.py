"""What a training's samples scored before: not every visit needs the filter's extra pass then."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..arrays import Float, Tensor
from .sample_log import Sample

SMALLEST = 1e-30
"""Lowest score whose logarithm is taken."""
DRIFT, BLEND = 0.05, 0.3
"""What the newest score counts in the level of its timesteps, and in the standing of its sample."""
IDENTITY_BYTES = 6
"""Of a sample's hash: float64, in which processes exchange it, holds 53 bits exactly."""


def identities(samples: Sequence[Sample]) -> Float[Tensor, " sample"]:
    """Return a number for each sample, equal in every process and in a resumed training."""
    hashes = (hashlib.sha256(f"{s.file}\0{s.caption}".encode()).digest() for s in samples)
    numbers = [int.from_bytes(each[:IDENTITY_BYTES], "big") for each in hashes]
    return torch.tensor(numbers, dtype=torch.float64)


@dataclass
class Recall:
    """Expects a score from the level of its timesteps and the standing of its sample.

    Scores move by orders of magnitude with the timestep and less between samples, so the logarithm
    of a score is taken as a level, per bin of timesteps, plus a standing, per sample. A visit is
    measured when either is unknown, when the expectation is near the threshold, or when the sample
    was not measured for long.
    `make bench NAME=trainers ARGS="--only cheap"` measures how many visits that saves and how many
    decisions stay the same; the defaults were chosen on a single training.
    """

    margin: float = 0.4
    """Measure when the expected score is within this of the threshold, in natural logarithms."""
    every: int = 16
    """Visits of a sample of which at least one is measured; 1 measures always."""
    bins: int = 10
    """Of equal width over `span`."""
    span: tuple[float, float] = (0.0, 1000.0)
    """Lowest and highest timestep of the training; what lies outside counts to the last bin."""
    levels: dict[int, float] = field(default_factory=dict, repr=False)
    """By bin, running mean of log scores."""
    known: dict[int, tuple[float, int]] = field(default_factory=dict, repr=False)
    """By a sample's identity, its standing and its visits since it was measured."""

    def __post_init__(self):
        if self.every < 1 or self.bins < 1 or not self.span[0] < self.span[1]:
            raise ValueError(
                "`every` and `bins` must be at least 1 and `span` rising, "
                f"got {self.every}, {self.bins} and {self.span}."
            )
        if not self.margin >= 0:
            raise ValueError(f"`margin` must be at least 0, got {self.margin}.")

    def due(
        self,
        who: Float[Tensor, " sample"],
        timesteps: Float[Tensor, " sample"],
        limits: Float[Tensor, " sample"],
    ) -> Tensor:
        """Return which of a step's samples are to be measured, [sample] of booleans.

        Args:
            who: Their `identities`.
            timesteps: Theirs.
            limits: Their thresholds.
        """
        expected = self.expected(who, timesteps).log()
        edges = limits.double().clamp_min(SMALLEST).log()
        near = (expected - edges).abs() < self.margin
        visits = [self.known.get(int(each), (0.0, 0))[1] for each in who.tolist()]
        old = torch.tensor([visit + 1 >= self.every for visit in visits])
        return expected.isnan() | near | old

    def expected(
        self, who: Float[Tensor, " sample"], timesteps: Float[Tensor, " sample"]
    ) -> Float[Tensor, " sample"]:
        """Return the scores to expect, NaN where nothing is known."""
        found = []
        for each, place in zip(who.tolist(), self._bins(timesteps), strict=True):
            seen = self.known.get(int(each))
            unknown = seen is None or place not in self.levels
            found.append(math.nan if unknown else math.exp(self.levels[place] + seen[0]))
        return torch.tensor(found, dtype=torch.float64)

    def learn(
        self,
        who: Float[Tensor, " sample"],
        timesteps: Float[Tensor, " sample"],
        scores: Float[Tensor, " sample"],
        measured: Tensor,
    ) -> None:
        """Take in a step of all processes; sorted, so that their number and order say nothing.

        Args:
            who: The samples' `identities`.
            timesteps: Theirs.
            scores: Theirs, measured or expected.
            measured: Which were measured, [sample] of booleans.
        """
        columns = (who.tolist(), self._bins(timesteps), scores.tolist(), measured.tolist())
        for each, place, score, known in sorted(zip(*columns, strict=True)):
            if not known:
                standing, visits = self.known[int(each)]
                self.known[int(each)] = (standing, visits + 1)
            elif math.isfinite(score):  # a diverged pass says nothing of the next one
                self._learn(int(each), place, math.log(max(score, SMALLEST)))

    def _learn(self, who: int, place: int, score: float) -> None:
        level = self.levels.get(place, score)
        self.levels[place] = level + DRIFT * (score - level)
        standing = score - self.levels[place]
        before = self.known.get(who, (standing, 0))[0]
        self.known[who] = (before + BLEND * (standing - before), 0)

    def _bins(self, timesteps: Tensor) -> list[int]:
        low, high = self.span
        places = ((timesteps - low) / (high - low) * self.bins).long()
        return places.clamp(0, self.bins - 1).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, plain data that JSON can hold."""
        known = [[who, *value] for who, value in self.known.items()]
        return {"known": known, "levels": [[*pair] for pair in self.levels.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what another run of the same settings remembered."""
        self.levels = {place: level for place, level in state["levels"]}
        self.known = {who: (standing, visits) for who, standing, visits in state["known"]}
