"""`unmemorize mitigate`: prompts sampled as they are and with the methods, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..shared.score.config import DetectionConfig
from .common.options import (
    AnswerOptions,
    AuditConfig,
    CalibrationFile,
    Controls,
    Force,
    GenerationSteps,
    ModelOptions,
    OutputFolder,
    Prompts,
    Rate,
    Texts,
    check_calibration,
    settings_in,
    takes_options,
)
from .common.terminal import FOUND, NOTHING_FOUND, answering, bar, print_json, print_table


@dataclass(frozen=True, kw_only=True)
class MitigateOptions(AnswerOptions, ModelOptions):
    """Of `unmemorize mitigate`."""

    prompts: Prompts = None
    prompt: Texts = None
    method: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="reword, ordinary, embedding, delayed_guidance, …; repeatable; `all` compares "
            "all. Default: reword."
        ),
    ] = None
    gate: Annotated[
        str, typer.Option(help="calibrated (acts above the threshold only), always, never.")
    ] = "calibrated"
    images: Annotated[int, typer.Option(min=1, help="Images of each prompt and method.")] = 4
    advice: Annotated[bool, typer.Option(help="Also search for a better wording.")] = True
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Also search for known training images of prompts above the threshold with "
            "optimised embeddings: are they still in the model?",
        ),
    ] = False
    training: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Folder of training images: all images are compared with them, and the method "
            "`neighbour` keeps away from them and from the captions beside them. Default: those "
            "beside the prompts."
        ),
    ] = None
    guidance_scale: Annotated[float, typer.Option(help="Guidance of all images; 1 is none.")] = (
        DetectionConfig.cond_scale
    )
    controls: Controls = AuditConfig.controls
    calibration: CalibrationFile = None
    force: Force = False
    output: OutputFolder = Path("unmemorize-mitigation")
    overwrite: Annotated[bool, typer.Option(help="Replace another job in the folder.")] = False
    false_positive_rate: Rate = AuditConfig.false_positive_rate
    generation_steps: GenerationSteps = 30


@takes_options
def mitigate(options: MitigateOptions) -> None:
    """Sample prompts as they are and mitigated, from the same seeds, and write a page of both.

    Without prompts, a few captions of the demo. Interrupted, the same command continues.
    """
    check_calibration(options)
    with answering(options, resumes=True):
        from ..audit.model.mitigation import run_mitigation
        from ..audit.model.mitigation_result import MitigationConfig

        given = settings_in(options, AuditConfig) | {
            "prompts": tuple(options.prompts or ()),
            "detection": DetectionConfig(cond_scale=options.guidance_scale),
        }
        config = MitigationConfig(
            audit=AuditConfig(**given), texts=tuple(options.prompt or ()),
            methods=tuple(options.method or ()), gate=options.gate, images=options.images,
            advise=options.advice, probe=options.probe, training=options.training,
        )  # fmt: skip
        result = run_mitigation(config, bar)
    if options.as_json:
        print_json(result.summary | {"output": str(options.output)})
    else:
        from ..audit.model.mitigation_page import method_rows

        columns = ["method", "acted on", "still above", "copies", "time per image"]
        print_table("Same seeds, with and without", columns, method_rows(result))
        typer.echo(f"The page: {options.output / 'mitigation.html'}")
    raise typer.Exit(FOUND if result.summary["memorized"] else NOTHING_FOUND)
