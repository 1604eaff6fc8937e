"""Options that several commands share, each declared once, and how a command takes them.

A command takes one frozen dataclass; `takes_options` shows typer its fields as options:

    @app.command()
    @takes_options
    def detect(options: DetectOptions) -> None: ...
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_type_hints

import typer

from ...audit.model.config import AuditConfig
from ...shared.score.config import DetectionConfig

if TYPE_CHECKING:
    from ...audit.common.subject import Subject

SEEDS = len(DetectionConfig.seeds)
CALIBRATION = Path("calibration.json")
"""Where a calibration is written unless another file is named."""

# Typer reads annotations at run time; older versions do not know `X | None` inside an alias.
Model = Annotated[
    str,
    typer.Argument(
        help="Diffusers folder, .safetensors checkpoint, hub id, `demo` or `demo-flow`."
    ),
]
Prompts = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option("--prompts", help="txt, csv, jsonl, parquet, or a training folder; repeatable."),
]
Texts = Annotated[Optional[list[str]], typer.Option("--prompt", help="One prompt; repeatable.")]  # noqa: UP045
Lora = Annotated[Optional[Path], typer.Option(help="LoRA file: kohya, PEFT or diffusers.")]  # noqa: UP045
Strength = Annotated[
    float, typer.Option(help="Of the LoRA, as it will be used; 1 is as it was trained.")
]
Controls = Annotated[
    str,
    typer.Option(help="Ordinary prompts: photographs, art, demo, or a file. Default: demo for "
                      "`demo` and `demo-flow`, else photographs."),
]  # fmt: skip
CalibrationFile = Annotated[
    Optional[Path], typer.Option("--calibration", help="Made by `unmemorize calibrate`.")  # noqa: UP045
]
Force = Annotated[
    bool, typer.Option(help="Use a calibration of another model or setting; the result says so.")
]
Seeds = Annotated[int, typer.Option(min=1, help="Starting noises, 0 to N - 1.")]
Steps = Annotated[
    int,
    typer.Option(min=1, max=50, help="First denoising steps, of 50."),
]
Rate = Annotated[
    float,
    typer.Option(min=1e-6, max=0.5, help="Share of ordinary prompts allowed above the threshold."),
]
Score = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="What prompts are judged by: residual, the part of what a prompt adds that "
                      "lies outside of what controls add (the default); magnitude, all of it "
                      "(Wen et al.; the default with --steps above 1)."),
]  # fmt: skip
Fast = Annotated[
    bool,
    typer.Option("--fast", "--sequential", help="Stop drawing seeds once a verdict is settled."),
]
Collapse = Annotated[
    bool,
    typer.Option("--collapse", help="Also sample three quick images of the most suspicious "
                 "prompts: how alike they are decides along with the score (60 passes each)."),
]  # fmt: skip
InstancePrompt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="The words that images without a caption were trained with."),
]
Trigger = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="The word that was taught. Default: read from folder and LoRA."),
]
GenerationSteps = Annotated[int, typer.Option(min=1, help="Sampling steps of an image.")]
OutputFile = Annotated[Path, typer.Option(help="File to write.")]
OutputFolder = Annotated[Path, typer.Option(help="Folder to write.")]
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, … Default: a GPU if any.")]  # noqa: UP045
Dtype = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="float32, float16, bfloat16. Default: float32 on a CPU; on a GPU float16, and "
        "bfloat16 for models that overflow in it."
    ),
]
Offload = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="For models larger than the GPU, weights rest on the CPU: model brings one "
                 "part at a time, group a layer and meanwhile the next, sequential a layer."),
]  # fmt: skip
Quantize = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Weights of few bits: nf4 (bitsandbytes), int8 or float8 (torchao). Scores "
                 "are those of another model."),
]  # fmt: skip
Batch = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--batch-size", min=1, help="Rows of one forward pass. Default: automatic."),
]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a hub id.")]  # noqa: UP045
Resolution = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=8, help="Side of the images in pixels. Default: the model's own."),
]
Frames = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Frames of a video. Default: the pipeline's own."),
]
ModelConfig = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Diffusers folder a single-file checkpoint takes its configuration from."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How a command answers."""

    as_json: Json = False
    debug: Debug = False


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model with its LoRA."""

    model: Model = AuditConfig.model
    lora: Lora = None
    strength: Strength = AuditConfig.strength
    revision: Revision = None
    model_config: ModelConfig = None
    resolution: Resolution = None
    frames: Frames = None
    device: Device = None
    dtype: Dtype = None
    offload: Offload = None
    quantize: Quantize = None

    @property
    def subject(self) -> "Subject":
        """The model, not loaded before something is computed with it."""
        from ...audit.common.subject import Subject

        return Subject.of(self)


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """What is measured of a prompt."""

    seeds: Seeds = SEEDS
    steps: Steps = DetectionConfig.steps
    batch_size: Batch = None

    @property
    def detection(self) -> DetectionConfig:
        """The settings of a detection with the first seeds."""
        return DetectionConfig(
            seeds=tuple(range(self.seeds)), steps=self.steps, batch_size=self.batch_size
        )


def check_calibration(options: Any) -> None:
    """Refuse --force without a calibration, and beside one what it has decided.

    Raises:
        typer.BadParameter: Names the option.
    """
    if options.calibration is None:
        if options.force:
            raise typer.BadParameter("--force needs --calibration.")
        return
    for name in ("controls", "score", "false_positive_rate"):
        usual = getattr(AuditConfig, name)
        if getattr(options, name, usual) != usual:
            raise typer.BadParameter(
                f"--{name.replace('_', '-')} does not go with --calibration, which was made with "
                "its own. Leave one of them out, or make another: unmemorize calibrate."
            )


def settings_in(options: Any, kind: type) -> dict[str, Any]:
    """Return the options that are settings of the same name; lists become tuples."""
    names = {field.name for field in fields(kind)} & {field.name for field in fields(options)}
    given = {name: getattr(options, name) for name in names}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def takes_options(command: Callable[[Any], None]) -> Callable[..., None]:
    """Show typer the fields of a command's dataclass as its parameters.

    Args:
        command: Takes one argument `options`, annotated with a dataclass. In `--help` the fields of
            the class itself come first, inherited ones after them.
    """
    kind = inspect.signature(command, eval_str=True).parameters["options"].annotation
    hints = get_type_hints(kind, include_extras=True)
    own = {name: place for place, name in enumerate(kind.__annotations__)}
    ordered = sorted(fields(kind), key=lambda field: own.get(field.name, len(own)))

    @wraps(command)
    def parsed(**values: Any) -> None:
        command(kind(**values))

    parameters = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[field.name],
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
        )
        for field in ordered
    ]  # fmt: skip
    # Any attribute may be set on a function; `inspect` reads this one.
    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parsed.__annotations__ = {field.name: hints[field.name] for field in ordered}
    return parsed
