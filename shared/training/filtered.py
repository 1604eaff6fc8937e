"""The filter over one whole training: its decisions, its records, its report."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .filter.filter import Gather, MemorizationFilter
from .filter.sample_log import Sample, SampleLog, records_path, write_report
from .replay import RandomState
from .settings import FilterSettings

logger = logging.getLogger(__name__)

TOLD = 5
"""Samples that the end of a training names."""


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
        self.filter = settings.make(span, gather)
        self._process, self._processes = process, processes
        beside = output.parent / f"{output.name.removesuffix('.safetensors')}.memorized.json"
        self._report = settings.report or beside

    def due(self, samples: Sequence[Sample], timesteps: Tensor) -> Tensor:
        """Return which samples need another prediction; see `Protection.due`."""
        due = self.filter.due(samples, timesteps)
        return torch.ones_like(due) if due.any() and self.filter.draws else due

    def weigh(
        self, cond: Tensor, uncond: Tensor, *, before: RandomState | None, **told: Any
    ) -> Tensor:
        """Return what to multiply each sample's loss by; see `Protection.weigh`."""
        if before is not None and before.is_past():
            self.filter.draws = True
        if self.filter.log is None:
            self.filter.log = self._open_log()
        return self.filter.weigh(cond, uncond, **told)

    def flush(self) -> None:
        """Write the records that wait."""
        if self.filter.log:
            self.filter.log.flush()

    def scalars(self) -> dict[str, float]:
        """Return values to log next to the loss; none before a sample was seen."""
        if not self.filter.seen:
            return {}
        values = {
            "filtered_share": self.filter.flagged / self.filter.seen,
            "score": self.filter.latest,
        }
        if self.filter.recall is not None:
            values["measured_share"] = self.filter.measured / self.filter.seen
        return values

    def account(self) -> dict[str, Any]:
        """Return what a LoRA's header tells of it."""
        return filter_account(self.settings, self.filter)

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
        first = ", ".join(each.sample.file for each in ranked[:TOLD])
        logger.info("Most memorized: %s; all samples: %s", first, self._report)

    def _open_log(self) -> SampleLog:
        """Return this process's log; one of an earlier training makes place for it."""
        path = records_path(self._report, self._process)
        if not self.filter.calls:
            path.unlink(missing_ok=True)
        return SampleLog(path)


def filter_account(asked: FilterSettings, done: MemorizationFilter) -> dict[str, Any]:
    """Return what was asked of the filter and what it saw, plain data."""
    return {
        "threshold": asked.text,
        "action": done.action,
        "unit": done.unit,
        "recall": asked.recall,
        "seen": done.seen,
        "measured": done.measured,
        "flagged": done.flagged,
    }
