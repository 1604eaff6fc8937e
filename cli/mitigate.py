"""`unmemorize mitigate`: prompts sampled as they are and with the methods, side by side."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from .options import (
    CalibrationFile,
    Controls,
    Debug,
    Device,
    Dtype,
    Force,
    GenerationSteps,
    Json,
    Lora,
    Model,
    ModelConfig,
    OutputFolder,
    Prompts,
    Rate,
    Resolution,
    Revision,
    Texts,
    audit_config,
)
from .terminal import FOUND, NOTHING_FOUND, answering, bar, print_json, print_table


def mitigate(
    model: Model = "demo",
    prompts: Prompts = None,
    prompt: Texts = None,
    lora: Lora = None,
    method: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="embedding, delayed_guidance, …; repeatable; `all` compares all. "
            "Default: embedding."
        ),
    ] = None,
    gate: Annotated[
        str, typer.Option(help="calibrated (acts above the threshold only), always, never.")
    ] = "calibrated",
    images: Annotated[int, typer.Option(min=1, help="Images of each prompt and method.")] = 4,
    advice: Annotated[bool, typer.Option(help="Also search for a better wording.")] = True,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Also seek known training images of prompts above the threshold with optimised "
            "embeddings: are they still in the model?",
        ),
    ] = False,
    controls: Controls = "",
    calibration: CalibrationFile = None,
    force: Force = False,
    output: OutputFolder = Path("unmemorize-mitigation"),
    overwrite: Annotated[bool, typer.Option(help="Replace another job in the folder.")] = False,
    false_positive_rate: Rate = 0.01,
    generation_steps: GenerationSteps = 30,
    revision: Revision = None,
    model_config: ModelConfig = None,
    resolution: Resolution = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Sample prompts as they are and mitigated, from the same seeds, and write a page of both.

    Without prompts, a few captions of the demo. Interrupted, the same command continues.
    """
    with answering(as_json=as_json, debug=debug):
        from ..audit.model.mitigation import run_mitigation
        from ..audit.model.mitigation_result import MitigationConfig

        config = MitigationConfig(
            audit=audit_config(locals()), texts=tuple(prompt or ()), methods=tuple(method or ()),
            gate=gate, images=images, advise=advice, probe=probe,
        )  # fmt: skip
        result = run_mitigation(config, bar)
    if as_json:
        print_json(result.summary | {"output": str(output)})
    else:
        from ..audit.model.mitigation_page import method_rows

        columns = ["method", "acted on", "copies", "time per image"]
        print_table("Same seeds, with and without", columns, method_rows(result))
        typer.echo(f"The page: {output / 'mitigation.html'}")
    raise typer.Exit(FOUND if result.summary["memorized"] else NOTHING_FOUND)
