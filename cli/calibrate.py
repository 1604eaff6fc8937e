"""`unmemorize calibrate`: the threshold that follows from ordinary prompts on this very model."""

from dataclasses import dataclass
from pathlib import Path

from .common.options import (
    AnswerOptions,
    AuditConfig,
    Collapse,
    Controls,
    DetectionOptions,
    ModelOptions,
    OutputFile,
    Rate,
    Score,
    takes_options,
)
from .common.terminal import answering, bar, print_json, print_table


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(AnswerOptions, ModelOptions, DetectionOptions):
    """Of `unmemorize calibrate`."""

    controls: Controls = AuditConfig.controls
    output: OutputFile = Path("calibration.json")
    false_positive_rate: Rate = AuditConfig.false_positive_rate
    score: Score = AuditConfig.score
    collapse: Collapse = AuditConfig.collapse


@takes_options
def calibrate(options: CalibrateOptions) -> None:
    """Score ordinary prompts on a model and keep the threshold that follows from them.

    With one step and two seeds or more, also that of the images that `unmemorize.observe` sees.
    """
    with answering(options, resumes=True):
        from ..audit.model.parts import make_calibration

        made = make_calibration(
            options.subject, controls=options.controls, rate=options.false_positive_rate,
            score=options.score, collapse=options.collapse, output=options.output,
            config=options.detection, bars=bar,
        )  # fmt: skip
    if options.as_json:
        print_json(made | {"output": str(options.output)})
    else:
        title = f"Calibration written to {options.output}"
        print_table(title, ["what", "value"], list(made.items()))
