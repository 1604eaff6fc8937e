"""A calibration from control prompts, kept as it grows: first what prompts are judged by."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...shared.files.storage import Journal
from ...shared.files.tensors import TensorFolder
from ...shared.score.calibration import Calibration
from ...shared.score.config import DetectionConfig
from .measure import Bars, measure, measure_collapses, measure_differences
from .subject import Facts, Subject

FIRST, TOLD = "first", "differences"
"""Folders of what controls add at the first step and at the told levels, until all is done."""


@dataclass(frozen=True, kw_only=True)
class Controls:
    """Control prompts of one job, how they are scored, and where that is kept."""

    subject: Subject
    """The model; not loaded when all is known."""
    facts: Facts
    """Of the same job."""
    prompts: Sequence[str]
    """Distinct."""
    config: DetectionConfig
    """What to measure."""
    journal: Journal
    """Of the magnitudes."""
    name: str
    """Of the list of controls."""
    rate: float
    """Of false positives, above 0 and below 1."""
    score: str
    """"residual", or "magnitude" to measure nothing else."""
    collapse: bool
    """Sample the suspicious controls as well, for a second stage."""
    job_key: str
    """Stands for model and settings in the keys."""
    folder: Path
    """Of this job alone, for what is finished."""
    bars: Bars
    """Makes the progress bars."""

    def judge(self) -> Calibration:
        """Return what prompts are judged by: half of the passes of a whole calibration.

        Raises:
            NotEnoughControls: They cannot support the rate.
        """
        if self.score == "magnitude":
            return self._with_second(self._magnitudes())
        kept, told = self.folder / "judge.json", TensorFolder(self.folder / TOLD)
        if not kept.is_file():
            differences = measure_differences(
                self.subject, self.facts, self.prompts, self.config, self.facts.residual["told"],
                told, bars=self.bars, phase="controls",
            )  # fmt: skip
            Calibration.of_residual(
                differences, self.prompts, model=self.subject.fingerprint,
                settings=self.facts.residual, name=self.name, false_positive_rate=self.rate,
            ).save(kept)  # fmt: skip
        told.remove()
        return self._with_second(Calibration.load(kept))

    def calibrate(self) -> Calibration:
        """Return the calibration that the controls support, which also judges sampled images.

        Raises:
            NotEnoughControls: They cannot support the rate.
        """
        judge = self.judge()
        if self.score == "magnitude":
            return judge
        kept, first = self.folder / "magnitudes.json", TensorFolder(self.folder / FIRST)
        if not kept.is_file():
            several = len(self.config.seeds) > 1
            calibration = self._magnitudes(first if several else None)
            if several:
                known = first.known()
                calibration = calibration.with_observed(torch.stack([*known.values()], dim=1))
            calibration.save(kept)
        first.remove()
        return replace(Calibration.load(kept), residual=judge)

    def _magnitudes(self, differences: TensorFolder | None = None) -> Calibration:
        measured = measure(
            self.subject, self.facts, self.prompts, self.config, self.journal,
            job_key=self.job_key, bars=self.bars, phase="controls, magnitude",
            differences=differences,
        )  # fmt: skip
        return Calibration.from_controls(
            measured.detection, model=self.subject.fingerprint, settings=self.facts.settings,
            name=self.name, false_positive_rate=self.rate,
        )  # fmt: skip

    def _with_second(self, judge: Calibration) -> Calibration:
        if not self.collapse:
            return judge
        suspicious = judge.suspicious(judge.seed_scores.nanmean(1))
        return judge.with_second(measure_collapses(
            self.subject, self.facts, self.prompts, suspicious, self.journal,
            job_key=self.job_key, bars=self.bars, phase="controls, collapse",
        ))  # fmt: skip
