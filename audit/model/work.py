"""One job on the prompts of a model: its folder, and the scores that all further work needs."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...shared.score.calibration import Calibration, prompts_sha256, settings_of
from ...shared.score.collapse import SecondStage
from ...shared.score.control_basis import require_direction
from ...shared.score.metrics import per_element
from ...shared.score.rates import require_controls
from ..common.controls import Controls
from ..common.job import Job, content_key, open_job
from ..common.measure import Bars, Measured, measure_judged, with_magnitudes
from ..common.result import finite, versions
from ..common.subject import Facts, Subject
from .config import AuditConfig, measured_score
from .inputs import Inputs
from .result import settings


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every phase reads, and the journals that keep what it has finished."""

    config: AuditConfig
    inputs: Inputs
    subject: Subject
    calibration: Calibration | None
    """The given one; without it the controls are scored."""
    job: Job
    bars: Bars
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds per phase, over all its parts."""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add how long the block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[phase] = self.timings.get(phase, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The scores of the prompts and the verdicts that follow from them."""

    facts: Facts
    calibration: Calibration
    measured: Measured
    scores: tuple[float, ...]
    """Per prompt."""
    flags: tuple[bool, ...]
    """Per prompt: its score is above the threshold."""
    caveats: tuple[str, ...]
    pace: float | None = None
    """Seconds of a row of a forward pass, as this run measured it; None where it measured none."""

    @property
    def flagged(self) -> list[int]:
        """Return the prompts above the threshold, highest score first."""
        hits = [index for index, flag in enumerate(self.flags) if flag]
        return sorted(hits, key=lambda index: (-self.scores[index], index))


@contextmanager
def open_work(
    config: AuditConfig, inputs: Inputs, bars: Bars, more: Mapping[str, Any] | None = None
) -> Iterator[Work]:
    """Claim the output folder for a job on the model that the settings name.

    Args:
        config: Names model and folder.
        inputs: Prompts and controls.
        bars: Makes the progress bars.
        more: What decides the results besides, as JSON values by readable names.

    Raises:
        FolderTaken: The output folder holds something else.
        ModelError: The model or LoRA cannot be used.
        CalibrationMismatch: The given calibration is for another model or setting.
        NotEnoughControls: The controls cannot support the false-positive rate.
        StorageError: Nothing can be written.
    """
    subject = Subject.of(config)
    calibration = Calibration.load(config.calibration) if config.calibration else None
    prompts = inputs.prompts
    identity = {
        "model": subject.fingerprint,
        "device": subject.device,
        "dtype": subject.dtype,
        "resolution": subject.resolution,
        "prompts": prompts_sha256([*prompts.prompts, *map(str, prompts.sources)]),
        "controls": None if calibration else prompts_sha256(inputs.controls),
        "calibration": calibration and content_key(calibration.to_values(), config.force),
        **settings(config),
        **{f"version of {name}": number for name, number in versions().items()},
        **(more or {}),
    }

    def check() -> None:
        """Load the model, and see that the calibration or the controls can carry a verdict."""
        if calibration is None:
            require_controls(len(inputs.controls), config.false_positive_rate)
            if measured_score(config.score, config.detection) == "residual":
                require_direction(len(inputs.controls))
            if config.collapse:
                SecondStage.require_controls(len(inputs.controls), config.false_positive_rate)
        denoiser = subject.denoiser
        if calibration is not None:
            judge = calibration.judge
            now = settings_of(denoiser, config.detection, judge.settings.get("told"))
            judge.check(subject.fingerprint, now, force=config.force)
            if config.collapse:
                judge.require_second()

    with open_job(config.output, identity, overwrite=config.overwrite, check=check) as job:
        yield Work(config=config, inputs=inputs, subject=subject, calibration=calibration, job=job,
                   bars=bars)  # fmt: skip


def score(work: Work) -> Scored:
    """Return the scores of the prompts and a calibration: the given one, or one of the controls."""
    return complete_scores(work, first_scores(work))


def first_scores(work: Work) -> Scored:
    """Return what decides the verdicts; `complete_scores` adds the rest.

    The calibration then judges prompts alone, and magnitudes stand beside no residual.
    """
    config, subject = work.config, work.subject
    with work.timed("load"):
        facts = subject.facts(work.job.journal("model"), config.detection)
    with work.timed("controls"):
        calibration, caveat = work.calibration, ""
        if calibration is not None:
            judge = calibration.judge
            caveat = judge.check(subject.fingerprint, facts.of(judge), force=config.force)
        else:
            calibration = _controls(work, facts).judge()
    journal, prompts = work.job.journal("detection"), work.inputs.prompts.prompts
    judge = calibration.judge
    missing = sum(content_key(work.job.key, prompt) not in journal for prompt in prompts)
    with work.timed("detection"):
        measured = measure_judged(
            subject, facts, prompts, config.detection, journal, judge=judge,
            sequential=config.sequential, collapse=config.collapse, job_key=work.job.key,
            bars=work.bars,
        )  # fmt: skip
    rows, scores = missing * len(config.detection.seeds), measured.detection.scores
    return Scored(
        facts=facts, calibration=calibration, measured=measured, scores=tuple(scores.tolist()),
        flags=tuple(judge.flags(scores, measured.sampled).tolist()),
        caveats=(
            *facts.caveats,
            *filter(None, (caveat, judge.unlike(scores), judge.coarse(scores, measured.sampled))),
        ),
        pace=work.timings["detection"] / rows if rows else None,
    )  # fmt: skip


def complete_scores(work: Work, scored: Scored) -> Scored:
    """Return first scores with the magnitudes, and the calibration that judges images as well."""
    calibration, measured = scored.calibration, scored.measured
    with work.timed("controls"):
        if work.calibration is None:
            calibration = _controls(work, scored.facts).calibrate()
    with work.timed("detection"):
        if calibration.judge.basis is not None:
            measured = with_magnitudes(
                measured, work.subject, scored.facts, work.job.journal("detection"),
                job_key=work.job.key, bars=work.bars,
            )  # fmt: skip
    return replace(scored, calibration=calibration, measured=measured)


def _controls(work: Work, facts: Facts) -> Controls:
    config = work.config
    return Controls(
        subject=work.subject, facts=facts, prompts=work.inputs.controls, config=config.detection,
        journal=work.job.journal("controls"), name=work.inputs.controls_name,
        rate=config.false_positive_rate, score=measured_score(config.score, config.detection),
        collapse=config.collapse, job_key=work.job.key,
        folder=work.job.folder / "journal" / "controls", bars=work.bars,
    )  # fmt: skip


def verdicts(measured: Measured, calibration: Calibration | None) -> list[dict[str, Any]]:
    """Return one row a prompt as JSON values; without a calibration the verdicts are None."""
    detection = measured.detection
    scores, none = detection.scores, [None] * len(detection.prompts)
    sampled = measured.sampled
    magnitudes = torch.tensor(measured.magnitudes) if measured.magnitudes else scores
    if not measured.magnitudes and calibration is not None and calibration.basis is not None:
        magnitudes = torch.full_like(scores, torch.nan)  # not measured yet
    columns = {
        "prompt": detection.prompts,
        "cut": measured.cuts,
        "score": scores.tolist(),
        "trace": finite(detection.traces.tolist()),
        "magnitude": magnitudes.tolist(),
        "magnitude_per_element": per_element(magnitudes, (detection.latent_elements,)).tolist(),
        "collapse": measured.collapses or none,
        "p_value": calibration.p_values(scores, sampled).tolist() if calibration else none,
        "q_value": calibration.adjusted(scores, sampled).tolist() if calibration else none,
        "memorized": calibration.flags(scores, sampled).tolist() if calibration else none,
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
