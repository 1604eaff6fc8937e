"""The filter over one whole training: its decisions, its records, its report."""

import atexit
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..wording import name_some
from .filter.expectation import Expectation, Recall
from .filter.filter import Gather, MemorizationFilter, scores_of
from .filter.sample_log import RankedSample, Sample, SampleLog, records_path, write_report
from .filter.watch import Finding, Watch
from .projection.factors import UnsupportedTraining
from .replay import RandomState
from .settings import FilterSettings

logger = logging.getLogger(__name__)

NAMED = 5
"""Samples that the log names at the end of a training."""


class NoSampleSeen(RuntimeError):
    """A training ended without a sample that the filter looked at."""


class NothingJudged(RuntimeError):
    """A training was to end in time, and there was never a verdict."""


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
        if settings.watches and processes > 1:
            raise UnsupportedTraining(
                f"--mem_warn and --mem_stop watch one process's images, and there are {processes} "
                "processes: train with one, or leave them out."
            )
        self.settings = settings
        self.ends = ""
        """Why the training is to end now; empty while it is to go on."""
        self._inside: Path | None = None
        self._judged = False
        self._ranked: list[RankedSample] = []
        self.filter = MemorizationFilter(
            settings.threshold(span),
            action=settings.action,
            gather=gather,
            expectation=Expectation(span=span),
            recall=None if settings.recall is None else Recall(every=settings.recall),
            watch=Watch(span) if settings.watches else None,
        )
        self._process, self._processes = process, processes
        beside = output.parent / f"{output.name.removesuffix('.safetensors')}.memorized.json"
        self._report = settings.report or beside

    def due(self, samples: Sequence[Sample], timesteps: Tensor) -> Tensor:
        """Return which samples need another prediction; see `Protection.due`."""
        due = self.filter.due(samples, timesteps)
        return torch.ones_like(due) if due.any() and self.filter.draws else due

    def weigh(
        self, cond: Tensor, uncond: Tensor, *, before: RandomState | None,
        controls: tuple[Tensor, Tensor] | None, **visits: Any,
    ) -> Tensor:  # fmt: skip
        """Return what to multiply each sample's loss by; see `Protection.weigh`."""
        if before is not None and before.is_past():
            self.filter.draws = True
        if self.filter.log is None:
            path = records_path(self._report, self._process)
            if not self.filter.calls:  # not resumed: the records are those of another training
                path.unlink(missing_ok=True)
            self.filter.log = SampleLog(path)
            if self._process == 0:
                atexit.register(self.report)  # also where Ctrl-C or an error ends the training
        if controls is not None:
            self._learn_controls(controls, **visits)
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
        if done.watch is not None:
            values["memorized_images"] = len(done.watch.since)
        return values

    def controls_due(self, samples: Sequence[Sample]) -> Tensor:
        """Return of which samples the score without the LoRA is needed; see `Protection`."""
        watch = self.filter.watch
        return torch.tensor(
            [False] * len(samples) if watch is None else watch.due(samples), dtype=torch.bool
        )

    def after_save(self, path: Path) -> None:
        """Report at a saved file, and find out whether it is the last one to be trained."""
        watch = self.filter.watch
        if watch is None or not self.filter.seen:
            return
        watch.update(self.filter.calls)
        finding = watch.judge()
        if finding is None:
            logger.info("%s: no verdict yet: %s.", path.name, watch.missing)
        else:
            self._note(path, finding)
        self.report()

    def _note(self, path: Path, finding: Finding) -> None:
        """Say what a saved file's verdict is, and remember the last one that is inside."""
        self._judged = True
        names = f" ({name_some(finding.memorized)})" if finding.memorized else ""
        count = f"{len(finding.memorized)} of {finding.images} images are being memorized{names}"
        where = "inside" if finding.inside else "outside"
        logger.warning("%s: %s, %s the controls' interval.", path.name, count, where)
        if finding.inside:
            self._inside = path
        elif self.settings.stop:
            self.ends = f"{count} in {path.name}. " + (
                f"The last saved file inside the controls' interval is {self._inside.name}."
                if self._inside
                else "No saved file is inside the controls' interval: save more often."
            )

    def report(self) -> None:
        """Write the ranked list as it is now.

        Raises:
            StorageError: It cannot be written.
        """
        self.flush()
        account = self.account()
        if self.filter.watch is not None:  # names stand here, and not in the LoRA's header
            inside = None if self._inside is None else self._inside.name
            account |= {"memorized_since": self.filter.watch.since, "last_inside": inside}
        if records_path(self._report, self._process).is_file():
            self._ranked = write_report(self._report, self._processes, account)

    def account(self) -> dict[str, Any]:
        """Return settings and counts for the report and the LoRA's metadata, plain data."""
        watch = self.filter.watch
        return {
            "threshold": self.settings.text,
            "action": self.filter.action,
            "unit": "rms",
            "recall": self.settings.recall,
            "seen": self.filter.seen,
            "measured": self.filter.measured,
            "flagged": self.filter.flagged,
            **({} if watch is None else {"memorized_images": len(watch.since)}),
        }

    def _learn_controls(
        self, controls: tuple[Tensor, Tensor], *, timesteps: Tensor, samples: Sequence[Sample],
        scale: Tensor | None = None,
    ) -> None:  # fmt: skip
        assert self.filter.watch is not None, "only a watched training has controls"
        due = self.controls_due(samples)
        scores = scores_of(*controls, None if scale is None else scale[due.to(scale.device)])
        some = [sample for sample, each in zip(samples, due.tolist(), strict=True) if each]
        self.filter.watch.learn_base(some, timesteps[due.to(timesteps.device)], scores)

    def finish(self) -> None:
        """Write the ranked list of samples.

        Raises:
            NoSampleSeen: There is nothing to rank.
            NothingJudged: The training was to end in time, and no saved file had a verdict.
            StorageError: The report cannot be written.
        """
        atexit.unregister(self.report)
        self.flush()
        if not self.filter.seen:
            raise NoSampleSeen("The memorization filter saw no sample.")
        self.report()
        first = ", ".join(each.sample.file for each in self._ranked[:NAMED])
        logger.info("Most memorized: %s; all samples: %s", first, self._report)
        if self.settings.stop and not self._judged:
            assert self.filter.watch is not None, "what is to stop is watched"
            why = self.filter.watch.missing or "none was saved"
            raise NothingJudged(
                f"--mem_stop had no verdict on any saved file: {why}. Train longer and save more "
                "often, or leave it out."
            )
