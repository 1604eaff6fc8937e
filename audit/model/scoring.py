"""What every job on a model begins with: a calibration, and the scores of its prompts."""

from ...shared.score.calibration import Calibration
from ..common.job import Job
from ..common.measure import Bars, Measured, measure
from ..common.subject import Facts, Subject
from .config import AuditConfig
from .inputs import Inputs


class Scoring:
    """Measures with the journals of one job; what stands there is not measured again."""

    def __init__(
        self, config: AuditConfig, inputs: Inputs, subject: Subject, job: Job, key: str, bars: Bars
    ):
        self.config, self.inputs, self.subject = config, inputs, subject
        self.job, self.key, self.bars = job, key, bars

    def calibrate(self, facts: Facts) -> tuple[Calibration, str]:
        """Return the calibration and what must be said about it.

        Raises:
            CalibrationMismatch: The given one is for another model or setting.
            NotEnoughControls: The controls cannot support the false-positive rate.
        """
        config = self.config
        if config.calibration:
            calibration = Calibration.load(config.calibration)
            caveat = calibration.check(self.subject.fingerprint, facts.settings, force=config.force)
            return calibration, caveat
        measured = self._measure("controls", self.inputs.controls, facts, None)
        return Calibration.from_controls(
            measured.detection,
            model=self.subject.fingerprint,
            settings=facts.settings,
            name=self.inputs.controls_name,
            false_positive_rate=config.false_positive_rate,
        ), ""

    def detect(self, facts: Facts, calibration: Calibration) -> Measured:
        """Return the scores of the prompts, with as many seeds as the config asks for."""
        sequentially = calibration if self.config.sequential else None
        return self._measure("detection", self.inputs.prompts.prompts, facts, sequentially)

    def _measure(
        self, name: str, prompts: tuple[str, ...], facts: Facts, sequentially: Calibration | None
    ) -> Measured:
        return measure(
            self.subject, facts, prompts, self.config.detection, self.job.journal(name),
            job_key=self.key, bars=self.bars, phase=name, sequentially=sequentially,
        )  # fmt: skip
