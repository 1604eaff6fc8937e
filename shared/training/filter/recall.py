"""Which visits of a training need the filter's extra pass, and which can be expected."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ...arrays import Float, Tensor
from .expectation import Visits


@dataclass
class Recall:
    """Measures a visit when nothing is known, when the decision is open, and every so often.

    `make bench NAME=trainers ARGS="--only cheap"` measures how many visits that saves and how many
    decisions stay the same; the defaults were chosen on others.
    """

    margin: float = 0.27
    """Measure when what is expected is within this of the threshold, in natural logarithms."""
    every: int = 16
    """Visits of a file, and of a caption, of which at least one is measured; 1 measures always."""
    since: dict[int, int] = field(default_factory=dict, repr=False)
    """By caption and by file, visits since one was measured."""

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1, got {self.every}.")
        if not self.margin >= 0:
            raise ValueError(f"`margin` must be at least 0, got {self.margin}.")

    def due(
        self, visits: Visits, expected: Float[Tensor, " sample"], limits: Float[Tensor, " sample"],
        tail: Float[Tensor, " sample"],
    ) -> Tensor:  # fmt: skip
        """Return which visits are to be measured, [sample] of booleans.

        Args:
            visits: Of a step.
            expected: What their thresholds would be compared with, NaN where that is not known.
            limits: Those thresholds.
            tail: Above which scores move the threshold when it learns them, infinity for none. So
                would guesses: all is measured there, from half the margin below on.
        """
        logs = expected.log()
        near = (logs - limits.double().log()).abs() < self.margin
        near = torch.where(tail.isinf(), near, logs > tail.double().log() - self.margin / 2)
        names = zip(visits.captions.tolist(), visits.files.tolist(), strict=True)
        waited = [max(self.since.get(int(name), 0) for name in pair) for pair in names]
        return expected.isnan() | near | (torch.tensor(waited) + 1 >= self.every)

    def learn(self, visits: Visits) -> None:
        """Take in a step of all processes."""
        for names in (visits.captions, visits.files):
            columns = (names, visits.measured, visits.scores)
            for name, measured, score in sorted(zip(*(c.tolist() for c in columns), strict=True)):
                known = measured and math.isfinite(score)
                self.since[int(name)] = 0 if known else self.since.get(int(name), 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, plain data that JSON can hold."""
        return {"since": [[*pair] for pair in sorted(self.since.items())]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what another run of the same settings remembered."""
        self.since = dict(state.get("since", ()))  # an earlier version told other things
