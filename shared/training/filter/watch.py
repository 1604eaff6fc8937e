"""Which images are being memorized, against what the base model does with the same images.

The base's own scores are measured without the LoRA, on the first `VISITS` visits of each image: the
controls. The latest `VISITS` visits with the LoRA are compared with them. Scores move with the
timestep, so the logarithm of each is taken above the base's mean level at its timestep.

An image is being memorized when its caption moves the prediction further than the base's captions
move it on `SHARE` of the images of this set, and further than it moved the base on this image by
more than the noise of so many visits, which the halves of the base's visits show. Chance alone puts
1 - SHARE of the images above the first limit; a set is inside the controls' interval while the
count of such images can be chance (Clopper-Pearson).

**Silent where images share captions.** With one caption for all, text that moves the prediction
tells no image from another: `judge` gives no verdict there.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arrays import Tensor
from .sample_log import SMALLEST, Record, Sample

VISITS = 6
"""Of an image, with the LoRA and without, that are compared."""
IMAGES = 8
"""With all their visits, that a verdict needs."""
SHARE = 0.95
"""Of the base's images below the limit."""
NOISE = 1.645
"""Standard deviations of what chance does to one image, 5 % of which lie above."""
DISTINCT = 0.5
"""Captions for each image that a verdict needs: below it, too many images share theirs."""
EVERY = 50
"""Calls of the filter between two verdicts."""
RARE = 0.025
"""Probability below which chance does not explain a count: as a Clopper-Pearson interval of 95 %
that begins above the rate."""
BINS = 10
"""Of timesteps, at whose centres the base's level is known."""
Visit = tuple[float, float]
"""Timestep and log score."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the latest visits say of a set."""

    images: int
    """That were compared."""
    memorized: tuple[str, ...]
    """Files that are being memorized, the strongest first."""
    inside: bool
    """Whether chance explains how many there are: the set is inside the controls' interval."""

    @property
    def share(self) -> float:
        """Return the share of the images that are being memorized, 0 to 1."""
        return len(self.memorized) / self.images


class Watch:
    """Compares a training's images with what the base does with them; of one process."""

    def __init__(self, span: tuple[float, float]):
        """Watch a training whose timesteps lie in `span`."""
        if not span[0] < span[1]:
            raise ValueError(f"`span` must be rising, got {span}.")
        self.span = span
        self.since: dict[str, int] = {}
        """By file, the filter's call from which on it is being memorized."""
        self._base: dict[str, list[Visit]] = {}
        self._latest: dict[str, deque[Visit]] = {}
        self._captions: dict[str, str] = {}

    def due(self, samples: Sequence[Sample]) -> list[bool]:
        """Return of which samples the base's score is still needed."""
        return [len(self._base.get(sample.file, ())) < VISITS for sample in samples]

    def learn_base(self, samples: Sequence[Sample], timesteps: Tensor, scores: Tensor) -> None:
        """Learn scores [sample] that were measured without the LoRA."""
        for sample, visit in zip(samples, _visits(timesteps, scores), strict=True):
            known = self._base.setdefault(sample.file, [])
            if visit is not None and len(known) < VISITS:
                known.append(visit)

    def learn(self, call: int, records: Sequence[Record]) -> list[str]:
        """Learn the filter's records of a call, and return the files that are newly memorized.

        Scores that were expected, not measured, say nothing. There is a verdict every `EVERY`
        calls; in between no file is returned.
        """
        for record in records:
            if record.measured and SMALLEST <= record.score < math.inf:
                visits = self._latest.setdefault(record.sample.file, deque(maxlen=VISITS))
                visits.append((record.timestep, math.log(record.score)))
                self._captions[record.sample.file] = record.sample.caption
        return [] if call % EVERY else self.update(call)

    def update(self, call: int) -> list[str]:
        """Note from which call on which files are memorized, and return the new ones."""
        if (finding := self.judge()) is None:
            return []
        new = [file for file in finding.memorized if file not in self.since]
        self.since = {file: self.since.get(file, call) for file in finding.memorized}
        return new

    @property
    def missing(self) -> str:
        """Return why there is no verdict, empty where there is one."""
        compared = self._compared()
        if len(compared) < IMAGES:
            return (
                f"{len(compared)} of {len(self._latest)} images were seen {VISITS} times with the "
                f"LoRA and {VISITS} times measured without, and {IMAGES} are needed"
            )
        captions = {self._captions[file] or file for file in compared}
        if len(captions) < DISTINCT * len(compared):
            return (
                f"{len(compared)} images share {len(captions)} captions, and where images share "
                "captions the score cannot tell which are being memorized"
            )
        return ""

    def judge(self) -> Finding | None:
        """Return what the latest visits say; None where there is no verdict, see `missing`."""
        if self.missing:
            return None
        files = self._compared()
        base = np.array([self._heights(self._base[file]) for file in files])
        latest = np.array([self._heights(self._latest[file]).mean() for file in files])
        # The means of two halves differ by sqrt(2) times what those of two whole windows do.
        halves = base[:, ::2].mean(1) - base[:, 1::2].mean(1)
        noise = float(np.sqrt((halves**2).mean() / 2))
        limit = np.quantile(base.mean(1), SHARE, method="higher")
        above = (latest > limit) & (latest - base.mean(1) > NOISE * noise)
        order = np.argsort(-latest)
        return Finding(
            images=len(files),
            memorized=tuple(files[place] for place in order if above[place]),
            inside=_chance(int(above.sum()), len(files)) >= RARE,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, plain data that JSON can hold."""
        latest = {file: list(visits) for file, visits in self._latest.items()}
        return {
            "base": self._base, "latest": latest, "captions": self._captions, "since": self.since,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what another run remembered."""

        def visits(listed: list) -> list[Visit]:
            return [(float(timestep), float(score)) for timestep, score in listed]

        self._base = {file: visits(each) for file, each in state["base"].items()}
        self._latest = {
            file: deque(visits(each), maxlen=VISITS) for file, each in state["latest"].items()
        }
        self._captions, self.since = dict(state["captions"]), dict(state["since"])

    def _compared(self) -> list[str]:
        """Return the files that have all their visits."""
        return [
            file
            for file, visits in self._latest.items()
            if len(visits) == VISITS == len(self._base.get(file, ()))
        ]

    def _heights(self, visits: Sequence[Visit]) -> np.ndarray:
        """Return log scores above the base's mean level at their timesteps."""
        places, logs = np.array(list(visits)).T
        return logs - np.interp(places, *self._level())

    def _level(self) -> tuple[np.ndarray, np.ndarray]:
        """Return centres of bins of timesteps, and the base's mean log score in each."""
        places, logs = np.array([visit for each in self._base.values() for visit in each]).T
        low, high = self.span
        bins = ((places - low) / (high - low) * BINS).astype(int).clip(0, BINS - 1)
        known = np.unique(bins)
        means = np.array([logs[bins == each].mean() for each in known])
        return low + (known + 0.5) * (high - low) / BINS, means


def _chance(count: int, images: int) -> float:
    """Return the probability that so many or more images lie above the base's limit by chance."""
    rate = 1 - SHARE
    return sum(
        math.comb(images, each) * rate**each * (1 - rate) ** (images - each)
        for each in range(count, images + 1)
    )


def _visits(timesteps: Tensor, scores: Tensor) -> list[Visit | None]:
    """Return visits; None for scores that say nothing, of dropped captions or of none finite."""
    rows = zip(timesteps.tolist(), scores.tolist(), strict=True)
    return [
        (float(timestep), math.log(score)) if SMALLEST <= score < math.inf else None
        for timestep, score in rows
    ]
