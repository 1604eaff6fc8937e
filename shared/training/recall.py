"""What a training's samples scored before: not every visit needs the filter's extra pass then."""

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


@dataclass
class Recall:
    """Expects a score from the level of its timesteps and the standing of its sample.

    Scores move by orders of magnitude with the timestep and less between samples, so the logarithm
    of a score is taken as a level, per bin of timesteps, plus a standing, per sample. A visit is
    measured when either is unknown, when the expectation is near the threshold, or when the sample
    was not measured for long.
    `make bench NAME=trainers ARGS="--only filter"` measures how many visits that saves and how many
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
    known: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict, repr=False)
    """By file and caption, its standing and its visits since it was measured."""

    def __post_init__(self):
        if self.every < 1 or self.bins < 1 or not self.span[0] < self.span[1]:
            raise ValueError(
                "`every` and `bins` must be at least 1 and `span` rising, "
                f"got {self.every}, {self.bins} and {self.span}."
            )
        if not self.margin >= 0:
            raise ValueError(f"`margin` must be at least 0, got {self.margin}.")

    def due(self, samples: Sequence[Sample], timesteps: Tensor, limits: Tensor) -> Tensor:
        """Return which of a step's samples are to be measured, [sample] of booleans.

        Args:
            samples: Those of the step.
            timesteps: Theirs, [sample].
            limits: Their thresholds, [sample].
        """
        answers = []
        for sample, place, limit in zip(
            samples, self._bins(timesteps), limits.tolist(), strict=True
        ):
            expected = self._expected(sample, place)
            if expected is None or self.known[_key(sample)][1] + 1 >= self.every:
                answers.append(True)
            else:
                answers.append(abs(expected - math.log(max(limit, SMALLEST))) < self.margin)
        return torch.tensor(answers)

    def complete(
        self,
        samples: Sequence[Sample],
        timesteps: Tensor,
        due: Tensor,
        measured: Float[Tensor, " due"],
    ) -> Float[Tensor, " sample"]:
        """Return the scores of all samples of a step, and learn from those just measured.

        Args:
            samples: Those of the step.
            timesteps: Theirs, [sample].
            due: Which were measured.
            measured: Their scores, in order.
        """
        scores = torch.empty(len(samples), dtype=torch.float64)
        scores[due] = measured.double()
        places = self._bins(timesteps)
        for row in torch.nonzero(~due).flatten().tolist():
            scores[row] = math.exp(self._expected(samples[row], places[row]))
            standing, visits = self.known[_key(samples[row])]
            self.known[_key(samples[row])] = (standing, visits + 1)
        for row in torch.nonzero(due).flatten().tolist():
            if math.isfinite(scores[row]):  # a diverged pass says nothing of the next one
                self._learn(samples[row], places[row], math.log(max(scores[row], SMALLEST)))
        return scores

    def _expected(self, sample: Sample, place: int) -> float | None:
        """Return the logarithm of the score to expect, None where nothing is known."""
        seen = self.known.get(_key(sample))
        return None if seen is None or place not in self.levels else self.levels[place] + seen[0]

    def _learn(self, sample: Sample, place: int, score: float) -> None:
        level = self.levels.get(place, score)
        self.levels[place] = level + DRIFT * (score - level)
        standing = score - self.levels[place]
        before = self.known.get(_key(sample), (standing, 0))[0]
        self.known[_key(sample)] = (before + BLEND * (standing - before), 0)

    def _bins(self, timesteps: Tensor) -> list[int]:
        low, high = self.span
        places = ((timesteps - low) / (high - low) * self.bins).long()
        return places.clamp(0, self.bins - 1).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, plain data that JSON can hold."""
        known = [[*key, *value] for key, value in self.known.items()]
        return {"known": known, "levels": [[*pair] for pair in self.levels.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what another run of the same settings remembered."""
        self.levels = {place: level for place, level in state["levels"]}
        self.known = {
            (file, caption): (standing, visits)
            for file, caption, standing, visits in state["known"]
        }


def _key(sample: Sample) -> tuple[str, str]:
    return sample.file, sample.caption
