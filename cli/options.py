"""Arguments and options that several commands share, and the settings that they name."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from ..audit.common.subject import Subject
    from ..audit.model.config import AuditConfig
    from ..shared.score.config import DetectionConfig

# Typer reads annotations at run time; older versions do not know `X | None` inside an alias.
Model = Annotated[
    str, typer.Argument(help="Diffusers folder, .safetensors checkpoint, hub id, or `demo`.")
]
Prompts = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option("--prompts", help="txt, csv, jsonl, parquet, or a training folder; repeatable."),
]
Texts = Annotated[Optional[list[str]], typer.Option("--prompt", help="One prompt; repeatable.")]  # noqa: UP045
Lora = Annotated[Optional[Path], typer.Option(help="LoRA file: kohya, PEFT or diffusers.")]  # noqa: UP045
Controls = Annotated[
    str,
    typer.Option(help="Ordinary prompts: photographs, art, demo, or a file. Default: demo for the "
                      "demo model, else photographs."),
]  # fmt: skip
CalibrationFile = Annotated[
    Optional[Path], typer.Option("--calibration", help="Made by `unmemorize calibrate`.")  # noqa: UP045
]
Force = Annotated[
    bool, typer.Option(help="Use a calibration of another model or setting; the result says so.")
]
Seeds = Annotated[int, typer.Option(min=1, help="Starting noises, 0 to N - 1.")]
Steps = Annotated[int, typer.Option(min=1, max=50, help="First denoising steps, of 50.")]
Rate = Annotated[
    float,
    typer.Option(min=1e-6, max=0.5, help="Share of ordinary prompts allowed above the threshold."),
]
Fast = Annotated[
    bool,
    typer.Option("--fast", "--sequential", help="Stop drawing seeds once a verdict is settled."),
]
GenerationSteps = Annotated[int, typer.Option(min=1, help="Sampling steps of an image.")]
OutputFile = Annotated[Path, typer.Option(help="File to write.")]
OutputFolder = Annotated[Path, typer.Option(help="Folder to write.")]
Energy = Annotated[float, typer.Option(help="Share of the concept at which to stop.")]
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, … Default: a GPU if any.")]  # noqa: UP045
Dtype = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="float32, float16, bfloat16. Default: float32 on a CPU, float16 on a GPU."),
]
Batch = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--batch-size", min=1, help="Rows of one forward pass. Default: automatic."),
]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a hub id.")]  # noqa: UP045
Resolution = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=8, help="Side of the images in pixels. Default: the model's own."),
]
ModelConfig = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Diffusers folder a single-file checkpoint takes its configuration from."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# Of an audit of a LoRA.
Images = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder that --lora was trained on: audits the LoRA, not the prompts."),
]
HeldOut = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Images of the same subject that were not trained on: stricter controls."),
]
Reserve = Annotated[
    float, typer.Option(min=0, max=0.9, help="Share of --images that was not trained on.")
]
Trigger = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="The word that was taught. Default: read from folder and LoRA."),
]
Epochs = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option(help="Saved epochs, files or a folder; repeatable: which one to publish?"),
]
Attack = Annotated[bool, typer.Option(help="Also try to extract images from base to LoRA.")]
IncludeImages = Annotated[
    bool, typer.Option("--include-images", help="Show training images in the page unblurred.")
]
Processes = Annotated[
    int, typer.Option(min=1, help="Processes that images are drawn by; on GPUs, one each.")
]


def detection_config(seeds: int, steps: int, batch_size: int | None = None) -> "DetectionConfig":
    """Return the settings of a detection with the first seeds."""
    from ..shared.score.config import DetectionConfig

    return DetectionConfig(seeds=tuple(range(seeds)), steps=steps, batch_size=batch_size)


def subject_of(options: dict[str, Any]) -> "Subject":
    """Return the model that the options of a command name, which are its locals."""
    from ..audit.common.subject import Subject

    names = ("model", "lora", "device", "dtype", "revision", "resolution")
    return Subject(config=options["model_config"], **{name: options[name] for name in names})


def audit_config(options: dict[str, Any], **settings: Any) -> "AuditConfig":
    """Return the settings of an audit that the options of a command name, which are its locals."""
    from ..audit.model.config import AuditConfig

    named = {field.name: options[field.name] for field in fields(AuditConfig)
             if field.name in options}  # fmt: skip
    return AuditConfig(**named | {"prompts": tuple(options["prompts"] or ())} | settings)
