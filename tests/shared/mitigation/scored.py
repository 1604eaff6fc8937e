"""Toy runs whose prompts a residual calibration scores, as a host hands them to a method."""

from dataclasses import replace

from runs import start_of
from toy import ToyDenoiser
from unmemorize.shared.mitigation.gate import AppliedGate, Gate
from unmemorize.shared.mitigation.method import Start
from unmemorize.shared.score.calibration import Calibration, settings_of
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.control_basis import told_steps
from unmemorize.shared.score.detection import control_differences, detect

SEEDS = (3, 5, 8)
CONTROLS = [f"a {a} {b}" for a in ("red", "old") for b in ("cat", "dog", "boat", "river", "snow")]


def calibrated(denoiser: ToyDenoiser, *, residual: bool = True) -> Calibration:
    """Return a calibration from `CONTROLS`, at a rate of .3."""
    config, told = DetectionConfig(seeds=SEEDS), told_steps(len(SEEDS), 50)
    calibration = Calibration.from_controls(
        detect(denoiser, CONTROLS, config), model="abc", settings=settings_of(denoiser, config),
        name="toy", false_positive_rate=0.3,
    )  # fmt: skip
    if not residual:
        return calibration
    differences = control_differences(denoiser, CONTROLS, config, told)
    return calibration.with_residual(differences, settings_of(denoiser, config, told))


def scored_start(denoiser: ToyDenoiser, prompts, calibration: Calibration, **settings) -> Start:
    """Return a run of one image per prompt whose gate was asked."""
    applied = AppliedGate(Gate(calibration=calibration), denoiser)
    start = start_of(denoiser, prompts, range(len(prompts)), calibration=calibration, **settings)
    applied.decide(start.cond)
    return replace(start, noises=applied.noises(), score=applied.scores)
