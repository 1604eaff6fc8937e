"""`unmemorize audit`: of a model and prompts, or with `--images` of a LoRA and its folder."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from . import audit_lora as cli_lora
from .options import (
    Attack,
    Batch,
    CalibrationFile,
    Controls,
    Debug,
    Device,
    Dtype,
    Epochs,
    Fast,
    Force,
    GenerationSteps,
    HeldOut,
    Images,
    IncludeImages,
    Json,
    Lora,
    Model,
    ModelConfig,
    OutputFolder,
    Processes,
    Prompts,
    Rate,
    Reserve,
    Resolution,
    Revision,
    Seeds,
    Steps,
    Trigger,
    audit_config,
    detection_config,
)
from .terminal import FOUND, NOTHING_FOUND, answering, bar, print_json, print_table

EXIT_CODES = """
Exit codes: 0 nothing found (or nothing to find), 3 at least one prompt is above the threshold
(of a LoRA with --images: at least one training image comes back), 1 failed, 2 wrong usage,
130 interrupted. Above the threshold does not mean certain: about
rate x prompts are expected there by chance, and the summary says how many.
"""


def audit(
    model: Model = "demo",
    prompts: Prompts = None,
    lora: Lora = None,
    controls: Controls = "",
    calibration: CalibrationFile = None,
    force: Force = False,
    output: OutputFolder = Path("unmemorize-audit"),
    overwrite: Annotated[
        bool, typer.Option(help="Replace another audit in the folder; the same one continues.")
    ] = False,
    seeds: Seeds = 4,
    steps: Steps = 1,
    false_positive_rate: Rate = 0.01,
    explain: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=0,
            metavar="N",
            help="Flagged prompts that are explained, highest score first; default: all.",
        ),
    ] = None,
    images_per_prompt: Annotated[
        int, typer.Option(min=0, help="Images of each flagged prompt; 0: no images at all.")
    ] = 2,
    flagged_pictured: Annotated[
        int, typer.Option(min=0, help="Flagged prompts with images, highest score first.")
    ] = 24,
    sample: Annotated[int, typer.Option(min=0, help="Other prompts with one image each.")] = 8,
    generation_steps: GenerationSteps = 30,
    fast: Fast = False,
    images: Images = None,
    held_out: HeldOut = None,
    reserve: Reserve = 0.0,
    trigger: Trigger = None,
    epochs: Epochs = None,
    attack: Attack = True,
    include_images: IncludeImages = False,
    processes: Processes = 1,
    revision: Revision = None,
    model_config: ModelConfig = None,
    resolution: Resolution = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Batch = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Audit a model: detect, explain, generate, compare, and write a report folder.

    Without MODEL the bundled demo is audited. With --lora and --images a LoRA and the folder it was
    trained on: are its images given back? Interrupted at any moment, the same command continues
    where it stopped; with other settings it asks for another folder.
    """
    if cli_lora.asked_for(locals()):
        cli_lora.audit_lora(locals())
    with answering(as_json=as_json, debug=debug):
        from ..audit.model.run import run_audit

        config = audit_config(
            locals(), sequential=fast, detection=detection_config(seeds, steps, batch_size)
        )
        result = run_audit(config, bar)
    if as_json:
        from ..audit.model.answers import audit_document

        print_json(audit_document(result))
    else:
        from ..audit.model.answers import audit_table, audit_verdict

        print_table(*audit_table(result))
        typer.echo(audit_verdict(result))
    raise typer.Exit(FOUND if result.flagged else NOTHING_FOUND)
