"""A calibration from control prompts, kept as it grows."""

from collections.abc import Sequence
from pathlib import Path

from ...shared.files.storage import Journal
from ...shared.files.tensors import TensorFolder
from ...shared.score.calibration import Calibration
from ...shared.score.config import DetectionConfig
from .measure import Bars, measure, measure_collapses, measure_differences
from .subject import Facts, Subject


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
    measured = measure(
        subject, facts, prompts, config, journal, job_key=job_key, bars=bars, phase="controls"
    )
    magnitudes = Calibration.from_controls(
        measured.detection, model=subject.fingerprint, settings=facts.settings, name=name,
        false_positive_rate=rate,
    )  # fmt: skip
    calibration = magnitudes
    if score == "residual":
        calibration = _with_residual(subject, facts, prompts, config, magnitudes, folder, bars)
    if collapse:
        judge = calibration.judge
        suspicious = judge.suspicious(judge.seed_scores.nanmean(1))
        calibration = calibration.with_second(measure_collapses(
            subject, prompts, suspicious, journal, job_key=job_key, bars=bars,
            phase="controls, collapse",
        ))  # fmt: skip
    return calibration


def _with_residual(
    subject: Subject, facts: Facts, prompts: Sequence[str], config: DetectionConfig,
    magnitudes: Calibration, folder: Path, bars: Bars,
) -> Calibration:  # fmt: skip
    if (kept := folder / "calibration.json").is_file():
        return Calibration.load(kept)
    finished = TensorFolder(folder / "differences")
    differences = measure_differences(
        subject, facts, prompts, config, facts.residual["told"], finished, bars=bars,
        phase="controls, residual",
    )  # fmt: skip
    calibration = magnitudes.with_residual(differences, facts.residual)
    calibration.save(kept)
    finished.remove()
    return calibration
