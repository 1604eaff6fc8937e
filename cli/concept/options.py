"""What the commands of `unmemorize concept` share: the model, and the texts that must stay."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ... import demo
from ..common.options import (
    AnswerOptions,
    Device,
    Dtype,
    Model,
    ModelConfig,
    ModelOptions,
    Offload,
    Quantize,
    Revision,
)

if TYPE_CHECKING:
    from ...audit.common.subject import Subject
    from ...shared.models.adapter import PipelineDenoiser

File = Annotated[
    Path, typer.Argument(help="Made by `unmemorize concept learn`, `build` or `layers`.")
]
Energy = Annotated[float, typer.Option(help="Share of the concept that its subspace is to cover.")]
Captions = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option(
        "--captions",
        help="What must stay: the training captions, as a file or training folder; repeatable. "
        "Default: ordinary photographs, and the demo's own for `demo` and `demo-flow`.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ConceptOptions(AnswerOptions):
    """The model that a file is made with or measured in."""

    model: Model
    revision: Revision = None
    model_config: ModelConfig = None
    device: Device = None
    dtype: Dtype = None
    offload: Offload = None
    quantize: Quantize = None

    @property
    def subject(self) -> "Subject":
        """The model, not loaded before something is computed with it."""
        return ModelOptions(
            model=self.model, revision=self.revision, model_config=self.model_config,
            device=self.device, dtype=self.dtype, offload=self.offload, quantize=self.quantize,
        ).subject  # fmt: skip

    @property
    def denoiser(self) -> "PipelineDenoiser":
        """The model, loaded."""
        return self.subject.denoiser


def prompts_in(files: Sequence[Path]) -> list[str]:
    """Return the distinct prompts of files."""
    from ...shared.files.prompts import clean, read_prompts

    return list(clean(each for path in files for each in read_prompts(path)).prompts)


def retained_captions(model: str, files: list[Path] | None) -> list[str]:
    """Return the texts that must stay: those of the files, else ordinary captions."""
    if files:
        return prompts_in(files)
    if model in demo.BUNDLED:
        return [caption.text for caption in demo.captions()]
    from ...shared.score.controls import CONTROLS, load_controls

    return load_controls(CONTROLS[0])
