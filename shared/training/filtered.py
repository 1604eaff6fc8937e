"""The filter over one whole training: its decisions, its records, its report."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .filter.expectation import Expectation, Recall
from .filter.filter import Gather, MemorizationFilter
from .filter.sample_log import Sample, SampleLog, records_path, write_report
from .replay import RandomState
from .settings import FilterSettings

logger = logging.getLogger(__name__)

NAMED = 5
"""Samples that the log names at the end of a training."""


class NoSampleSeen(RuntimeError):
    """A training ended without a sample that the filter looked at."""


class FilteredTraining:
    """A filter, with what it writes next to the LoRA."""

    def __init__(
        self,
        settings: FilterSettings,
        *,
        output: Path,
        process: int,
        processes: int,
        gather: Gather,
        span: tuple[float, float],
    ):
        """Set up; nothing is written yet. See `Protection` for the arguments."""
        self.settings = settings
        self.filter = MemorizationFilter(
            settings.threshold(span),
            action=settings.action,
            gather=gather,
            expectation=Expectation(span=span),
            recall=None if settings.recall is None else Recall(every=settings.recall),
        )
        self._process, self._processes = process, processes
        beside = output.parent / f"{output.name.removesuffix('.safetensors')}.memorized.json"
        self._report = settings.report or beside

    def due(self, samples: Sequence[Sample], timesteps: Tensor) -> Tensor:
        """Return which samples need another prediction; see `Protection.due`."""
        due = self.filter.due(samples, timesteps)
        return torch.ones_like(due) if due.any() and self.filter.draws else due

    def weigh(
        self, cond: Tensor, uncond: Tensor, *, before: RandomState | None, **visits: Any
    ) -> Tensor:
        """Return what to multiply each sample's loss by; see `Protection.weigh`."""
        if before is not None and before.is_past():
            self.filter.draws = True
        if self.filter.log is None:
            path = records_path(self._report, self._process)
            if not self.filter.calls:  # not resumed: the records are those of another training
                path.unlink(missing_ok=True)
            self.filter.log = SampleLog(path)
        return self.filter.weigh(cond, uncond, **visits)

    def flush(self) -> None:
        """Write the records that wait."""
        if self.filter.log:
            self.filter.log.flush()

    def scalars(self) -> dict[str, float]:
        """Return values to log next to the loss; none before a sample was seen."""
        done = self.filter
        if not done.seen:
            return {}
        values = {"filtered_share": done.flagged / done.seen, "score": done.latest}
        if done.recall is not None:
            values["measured_share"] = done.measured / done.seen
        return values

    def account(self) -> dict[str, Any]:
        """Return settings and counts for the report and the LoRA's metadata, plain data."""
        return {
            "threshold": self.settings.text,
            "action": self.filter.action,
            "unit": "rms",
            "recall": self.settings.recall,
            "seen": self.filter.seen,
            "measured": self.filter.measured,
            "flagged": self.filter.flagged,
        }

    def finish(self) -> None:
        """Write the ranked list of samples.

        Raises:
            NoSampleSeen: There is nothing to rank.
            StorageError: The report cannot be written.
        """
        self.flush()
        if not self.filter.seen:
            raise NoSampleSeen("The memorization filter saw no sample.")
        ranked = write_report(self._report, self._processes, self.account())
        first = ", ".join(each.sample.file for each in ranked[:NAMED])
        logger.info("Most memorized: %s; all samples: %s", first, self._report)
