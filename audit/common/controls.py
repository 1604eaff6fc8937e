"""A calibration from control prompts, kept as it grows."""

from collections.abc import Sequence
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


def calibrate_controls(
    subject: Subject,
    facts: Facts,
    prompts: Sequence[str],
    config: DetectionConfig,
    journal: Journal,
    *,
    name: str,
    rate: float,
    score: str,
    collapse: bool,
    job_key: str,
    folder: Path,
    bars: Bars,
) -> Calibration:
    """Score controls and return the calibration that they support.

    Args:
        subject: The model; not loaded when all is known.
        facts: Of the same job.
        prompts: The controls, distinct.
        config: What to measure.
        journal: Of the magnitudes.
        name: Of the list of controls.
        rate: Of false positives, above 0 and below 1.
        score: "residual", or "magnitude" to measure nothing else.
        collapse: Sample the suspicious controls as well, for a second stage.
        job_key: Stands for model and settings in the keys.
        folder: Of this job alone, for what is finished.
        bars: Makes the progress bars.

    Raises:
        NotEnoughControls: They cannot support the rate.
    """
    kept, first = folder / "calibration.json", TensorFolder(folder / FIRST)
    missing = score == "residual" and not kept.is_file()
    measured = measure(
        subject, facts, prompts, config, journal, job_key=job_key, bars=bars, phase="controls",
        differences=first if missing and len(config.seeds) > 1 else None,
    )  # fmt: skip
    calibration = Calibration.from_controls(
        measured.detection, model=subject.fingerprint, settings=facts.settings, name=name,
        false_positive_rate=rate,
    )  # fmt: skip
    if missing:
        calibration = _with_residuals(subject, facts, prompts, config, calibration, folder, bars)
        calibration.save(kept)
        first.remove()
        TensorFolder(folder / TOLD).remove()
    elif score == "residual":
        calibration = Calibration.load(kept)
    if collapse:
        judge = calibration.judge
        suspicious = judge.suspicious(judge.seed_scores.nanmean(1))
        calibration = calibration.with_second(measure_collapses(
            subject, facts, prompts, suspicious, journal, job_key=job_key, bars=bars,
            phase="controls, collapse",
        ))  # fmt: skip
    return calibration


def _with_residuals(
    subject: Subject, facts: Facts, prompts: Sequence[str], config: DetectionConfig,
    magnitudes: Calibration, folder: Path, bars: Bars,
) -> Calibration:  # fmt: skip
    calibration, first = magnitudes, TensorFolder(folder / FIRST).known()
    if first:
        calibration = calibration.with_observed(torch.stack([*first.values()], dim=1))
        del first
    differences = measure_differences(
        subject, facts, prompts, config, facts.residual["told"], TensorFolder(folder / TOLD),
        bars=bars, phase="controls, residual",
    )  # fmt: skip
    return calibration.with_residual(differences, facts.residual)
