"""What earlier visits of samples say about their scores, and which visits must be measured."""

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
"""The first score of a file moves the file's standing by one part in so many."""
CAPTION_KNOWN, FILES_KNOWN = 4, 8
"""Scores of a caption, and files in all, that a ratio needs."""
IDENTITY_BYTES = 6
"""Of a hash: float64, in which processes exchange it, holds 53 bits exactly."""


class Visits(NamedTuple):
    """A step's samples, one entry each, float64 on the CPU."""

    timesteps: Float[Tensor, " sample"]
    scores: Float[Tensor, " sample"]
    """NaN where it is not known."""
    measured: Float[Tensor, " sample"]
    """1 for a measured score, 0 for an expected one."""
    captions: Float[Tensor, " sample"]
    """A number for each caption, equal in every process and in a resumed training."""
    files: Float[Tensor, " sample"]
    """Likewise for each file with its caption."""

    @classmethod
    def of(cls, samples: Sequence[Sample], timesteps: Tensor) -> "Visits":
        """Return a step's samples before they are scored."""
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
        """Return the visits of a `table`, or of several processes' tables joined."""
        return cls(*table.unbind(1))

    def table(self) -> Float[Tensor, " sample column"]:
        """Return one tensor, which processes can exchange."""
        return torch.stack(list(self), dim=1)


@dataclass
class Expectation:
    """Predicts a score from earlier ones: its logarithm is the sum of four running means.

    log score = level of its timesteps + drift of the training + standing of its caption + standing
    of its file. Each mean is updated with what the three others leave of the newest score. Scores
    move by orders of magnitude with the timestep and rise while a LoRA learns; between captions
    they differ by factors, between files of one caption little. A single score is noisy (a standard
    deviation of .3 in the logarithm on the demo model), a standing is not.
    """

    bins: int = 10
    """Of equal width over `span`; between their centres levels are interpolated."""
    span: tuple[float, float] = (0.0, 1000.0)
    """Lowest and highest timestep of the training; one outside falls into the nearest bin."""
    levels: dict[int, tuple[float, int]] = field(default_factory=dict, repr=False)
    """By bin, mean log score of the usual caption, and of how many scores."""
    drift: float = 0.0
    """How far all scores have risen of late, in logarithms."""
    skipped: int = 0
    """Visits since the last measured score."""
    captions: dict[int, tuple[float, int]] = field(default_factory=dict, repr=False)
    """By caption, log ratio to the usual one, and of how many scores."""
    files: dict[int, tuple[float, int]] = field(default_factory=dict, repr=False)
    """By file, log ratio to its caption, and of how many scores."""
    _sorted: list[float] = field(default_factory=list, init=False, repr=False)
    """The captions' standings in rising order, so that their median costs nothing."""

    def __post_init__(self) -> None:
        if self.bins < 1 or not self.span[0] < self.span[1]:
            raise ValueError(
                f"`bins` must be at least 1 and `span` rising, got {self.bins} and {self.span}."
            )

    def scores(self, visits: Visits) -> Float[Tensor, " sample"]:
        """Return the expected scores, NaN where a caption or the timesteps are not known yet."""
        rows = zip(*(column.tolist() for column in visits), strict=True)
        logs = [
            self._level(timestep) + self.drift + self._standing(int(caption), int(file))
            if int(caption) in self.captions and self._bin(timestep) in self.levels
            else math.nan
            for timestep, _, _, caption, file in rows
        ]
        return torch.tensor(logs, dtype=torch.float64).exp()

    def ratios(self, visits: Visits) -> Float[Tensor, " sample"]:
        """Return each sample's score over the median caption's at like timesteps.

        Of the latest visits of its caption and file together, not of this visit alone. NaN before
        the caption was measured `CAPTION_KNOWN` times, and before `FILES_KNOWN` files were.
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
        """Learn a step of all processes; sorted, so that their number and order are lost."""
        rows = zip(*(column.tolist() for column in visits), strict=True)
        for timestep, score, measured, caption, file in sorted(rows, key=lambda row: row[::-1]):
            # A dropped caption says nothing about the caption, nor does a diverged training.
            if measured and SMALLEST <= score < math.inf:
                self._learn(timestep, math.log(score), int(caption), int(file))
                self.skipped = 0
            else:
                self.skipped += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, plain data that JSON can hold."""
        named = {name: getattr(self, name) for name in ("levels", "captions", "files")}
        listed = {
            name: [[key, *pair] for key, pair in sorted(each.items())]
            for name, each in named.items()
        }
        return {"drift": self.drift, "spared": self.skipped, **listed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what another run of the same settings remembered."""
        self.drift, self.skipped = state["drift"], state.get("spared", 0)
        for name in ("levels", "captions", "files"):
            setattr(self, name, {key: (value, count) for key, value, count in state[name]})
        self._sorted = sorted(standing for standing, _ in self.captions.values())

    def _learn(self, timestep: float, score: float, caption: int, file: int) -> None:
        standing, seen = self.captions.get(caption, (0.0, 0))
        own, times = self.files.get(file, (0.0, 0))
        place = self._bin(timestep)
        score -= self.drift
        level, count = self.levels.setdefault(place, (score - standing - own, 0))
        error = score - self._level(timestep) - standing - own
        if seen:
            # Skipped visits count too: else what is measured often would seem to stand out.
            risen = (1 - (1 - DRIFT) ** (self.skipped + 1)) * error
            self.drift += risen
            score -= risen
        self.levels[place] = (level + max(LEVEL, 1 / (count + 2)) * error, count + 1)
        error = score - self._level(timestep) - standing - own
        gain = max(CAPTION, 1 / (seen + 1.5)) * error
        if seen:
            del self._sorted[bisect_left(self._sorted, standing)]
        insort(self._sorted, standing + gain)
        self.captions[caption] = (standing + gain, seen + 1)
        self.files[file] = (own + max(FILE, 1 / (times + DOUBT)) * (error - gain), times + 1)

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


@dataclass
class Recall:
    """Chooses the visits to measure: those of unknown or undecided score, and one every so often.

    `make bench NAME=trainers ARGS="--only cheap"` measures how many visits are skipped and how many
    decisions stay the same, on trainings that the defaults were not chosen on.
    """

    margin: float = 0.27
    """A visit is measured when its expected score is this near the threshold, in logarithms."""
    every: int = 16
    """Visits of a file, and of a caption, of which at least one is measured; 1 measures all."""
    since: dict[int, int] = field(default_factory=dict, repr=False)
    """By caption and by file, visits since one was measured."""

    def __post_init__(self) -> None:
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
            expected: Expected score or ratio, as the threshold takes it; NaN where unknown.
            limits: Thresholds.
            tail: See `Threshold.tail`. Where it is finite, every visit expected above it, or less
                than half the margin below it, is measured: an expected score would move the
                threshold as a measured one does.
        """
        logs = expected.log()
        near = (logs - limits.double().log()).abs() < self.margin
        near = torch.where(tail.isinf(), near, logs > tail.double().log() - self.margin / 2)
        names = zip(visits.captions.tolist(), visits.files.tolist(), strict=True)
        waited = [max(self.since.get(int(name), 0) for name in pair) for pair in names]
        return expected.isnan() | near | (torch.tensor(waited) + 1 >= self.every)

    def learn(self, visits: Visits) -> None:
        """Count a step of all processes."""
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
        self.since = dict(state.get("since", ()))  # an earlier version had no such key


def _numbers(texts: Sequence[str]) -> Float[Tensor, " text"]:
    """Return a number for each text, by its hash."""
    hashes = [hashlib.sha256(text.encode("utf-8", "surrogatepass")) for text in texts]
    numbers = [int.from_bytes(each.digest()[:IDENTITY_BYTES], "big") for each in hashes]
    return torch.tensor(numbers, dtype=torch.float64)
