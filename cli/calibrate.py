"""`unmemorize calibrate`: the threshold that follows from ordinary prompts on this very model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..audit.common.wording import between, number, percent
from .common.options import (
    CALIBRATION,
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
    output: OutputFile = CALIBRATION
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
        print_table(title, ["what", "value"], list(_lines(made).items()))


def _lines(made: Mapping[str, Any]) -> dict[str, str]:
    """Return what a calibration says, numbers rounded as on the pages."""
    lines = {
        "score": made["score"],
        "controls": f"{made['n']}, {made['controls']}",
        "threshold": number(made["threshold"]),
        "false positives": f"{percent(made['false_positive_rate'])} allowed; of the controls "
        f"themselves {between(*made['interval'])} (95 % interval)",
    }
    if second := made["second_stage"]:
        lines["second stage"] = (
            f"{second['sampled']} controls sampled, those above {number(second['suspicion'])}; "
            f"threshold {number(second['threshold'])}"
        )
    observed = made["observed_threshold"]
    lines["threshold of sampled images"] = "none" if observed is None else number(observed)
    return lines | {"model": made["model"]}
