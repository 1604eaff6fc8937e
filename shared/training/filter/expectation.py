"""What earlier visits say of a score: those of its caption, of its file, of like timesteps."""

import hashlib
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ...arrays import Float, Tensor
from .sample_log import SMALLEST, Sample

LEVEL, DRIFT, CAPTION, FILE = 0.05, 0.03, 0.2, 0.1
"""Least weight of the newest score in each running mean; the first few weigh more."""
DOUBT = 4
"""Scores that a file's own standing must be drawn from to count half."""
CAPTION_KNOWN, FILES_KNOWN = 4, 8
"""Scores of a caption, and files, from which on a ratio is told."""
IDENTITY_BYTES = 6
"""Of a hash: float64, in which processes exchange it, holds 53 bits exactly."""


class Visits(NamedTuple):
    """A step's samples, one entry each, float64 on the CPU."""

    timesteps: Float[Tensor, " sample"]
    scores: Float[Tensor, " sample"]
    """NaN where it is not known."""
    measured: Float[Tensor, " sample"]
    """1 for a score that was measured, 0 for one that was expected."""
    captions: Float[Tensor, " sample"]
    """A number for each caption, equal in every process and in a resumed training."""
    files: Float[Tensor, " sample"]
    """Likewise for each file with its caption."""

    @classmethod
    def of(cls, samples: Sequence[Sample], timesteps: Tensor) -> "Visits":
        """Return what is known of a step's samples before they are scored."""
        places = timesteps.cpu().double()
        return cls(
            timesteps=places,
            scores=torch.full_like(places, math.nan),
            measured=torch.zeros_like(places),
            captions=_numbers([sample.caption or sample.file for sample in samples]),
            files=_numbers([f"{sample.file}\0{sample.caption}" for sample in samples]),
        )

    @classmethod
    def from_table(cls, table: Float[Tensor, " sample column"]) -> "Visits":
        """Return what `table` made of visits, perhaps those of several processes."""
        return cls(*table.unbind(1))

    def table(self) -> Float[Tensor, " sample column"]:
        """Return one tensor, which processes can exchange."""
        return torch.stack(list(self), dim=1)


@dataclass
class Expectation:
    """Splits the logarithm of a score into four running means, each of what the others leave.

    log score = level of its timesteps + drift of the training + standing of its caption + standing
    of its file. Scores move by orders of magnitude with the timestep and rise while a LoRA learns;
    between captions they differ by factors, between files of one caption little. A single score
    is noisy (a standard deviation of .3 in the logarithm on the demo model), a standing is not.
    """

    bins: int = 10
    """Of equal width over `span`; between their centres levels are interpolated."""
    span: tuple[float, float] = (0.0, 1000.0)
    """Lowest and highest timestep of the training; what lies outside counts to the last bin."""
    levels: dict[int, tuple[float, int]] = field(default_factory=dict, repr=False)
    """By bin, mean log score of the usual caption, and of how many scores."""
    drift: float = 0.0
    """What all scores have risen by lately, in logarithms."""
    spared: int = 0
    """Visits since the last one with a score."""
    captions: dict[int, tuple[float, int]] = field(default_factory=dict, repr=False)
    """By caption, log ratio to the usual one, and of how many scores."""
    files: dict[int, tuple[float, int]] = field(default_factory=dict, repr=False)
    """By file, log ratio to what its caption has, and of how many scores."""
    _sorted: list[float] = field(default_factory=list, init=False, repr=False)
    """The captions' standings in rising order."""

    def __post_init__(self):
        if self.bins < 1 or not self.span[0] < self.span[1]:
            raise ValueError(
                f"`bins` must be at least 1 and `span` rising, got {self.bins} and {self.span}."
            )

    def scores(self, visits: Visits) -> Float[Tensor, " sample"]:
        """Return the scores to expect, NaN where a caption or the timesteps are not known yet."""
        rows = zip(*(column.tolist() for column in visits), strict=True)
        logs = [
            self._level(timestep) + self.drift + self._standing(int(caption), int(file))
            if int(caption) in self.captions and self._bin(timestep) in self.levels
            else math.nan
            for timestep, _, _, caption, file in rows
        ]
        return torch.tensor(logs, dtype=torch.float64).exp()

    def ratios(self, visits: Visits) -> Float[Tensor, " sample"]:
        """Return how many times the median caption's score each sample has at like timesteps.

        Over the latest visits of its caption and file, not this one alone. NaN before the caption
        was measured `CAPTION_KNOWN` times, and before `FILES_KNOWN` files were.
        """
        if len(self.files) < FILES_KNOWN:
            return torch.full_like(visits.timesteps, math.nan)
        places = ((len(self._sorted) - 1) // 2, len(self._sorted) // 2)
        usual = sum(self._sorted[place] for place in places) / 2
        logs = [
            self._standing(int(caption), int(file)) - usual
            if self.captions.get(int(caption), (0.0, 0))[1] >= CAPTION_KNOWN
            else math.nan
            for caption, file in zip(visits.captions.tolist(), visits.files.tolist(), strict=True)
        ]
        return torch.tensor(logs, dtype=torch.float64).exp()

    def learn(self, visits: Visits) -> None:
        """Take in a step of all processes; sorted, so that their number and order say nothing."""
        rows = zip(*(column.tolist() for column in visits), strict=True)
        for timestep, score, measured, caption, file in sorted(rows, key=lambda row: row[::-1]):
            # A dropped caption says nothing of the caption, nor does a pass that diverged.
            if measured and SMALLEST <= score < math.inf:
                self._learn(timestep, math.log(score), int(caption), int(file))
                self.spared = 0
            else:
                self.spared += 1

    def _learn(self, timestep: float, score: float, caption: int, file: int) -> None:
        standing, seen = self.captions.get(caption, (0.0, 0))
        own, times = self.files.get(file, (0.0, 0))
        place = self._bin(timestep)
        score -= self.drift
        level, count = self.levels.setdefault(place, (score - standing - own, 0))
        error = score - self._level(timestep) - standing - own
        if seen:
            # Over spared visits too: else what is measured often would seem to stand out.
            risen = (1 - (1 - DRIFT) ** (self.spared + 1)) * error
            self.drift += risen
            score -= risen
        self.levels[place] = (level + max(LEVEL, 1 / (count + 2)) * error, count + 1)
        error = score - self._level(timestep) - standing - own
        gain = max(CAPTION, 1 / (seen + 1.5)) * error
        self._replace(caption, standing + gain, seen + 1)
        self.files[file] = (own + max(FILE, 1 / (times + DOUBT)) * (error - gain), times + 1)

    def _replace(self, caption: int, standing: float, seen: int) -> None:
        """Set a caption's standing, and keep all in order: their median costs nothing then."""
        if caption in self.captions:
            del self._sorted[bisect_left(self._sorted, self.captions[caption][0])]
        insort(self._sorted, standing)
        self.captions[caption] = (standing, seen)

    def _standing(self, caption: int, file: int) -> float:
        return self.captions[caption][0] + self.files.get(file, (0.0, 0))[0]

    def _level(self, timestep: float) -> float:
        low, high = self.span
        known = sorted(self.levels)
        centres = [low + (place + 0.5) * (high - low) / self.bins for place in known]
        return float(np.interp(timestep, centres, [self.levels[place][0] for place in known]))

    def _bin(self, timestep: float) -> int:
        low, high = self.span
        return min(max(int((timestep - low) / (high - low) * self.bins), 0), self.bins - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, plain data that JSON can hold."""
        named = {name: getattr(self, name) for name in ("levels", "captions", "files")}
        listed = {
            name: [[key, *pair] for key, pair in sorted(each.items())]
            for name, each in named.items()
        }
        return {"drift": self.drift, "spared": self.spared, **listed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what another run of the same settings remembered."""
        self.drift, self.spared = state["drift"], state.get("spared", 0)
        for name in ("levels", "captions", "files"):
            setattr(self, name, {key: (value, count) for key, value, count in state[name]})
        self._sorted = sorted(standing for standing, _ in self.captions.values())


def _numbers(texts: Sequence[str]) -> Float[Tensor, " text"]:
    """Return a number for each text, by its hash."""
    hashes = [hashlib.sha256(text.encode("utf-8", "surrogatepass")) for text in texts]
    numbers = [int.from_bytes(each.digest()[:IDENTITY_BYTES], "big") for each in hashes]
    return torch.tensor(numbers, dtype=torch.float64)


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
