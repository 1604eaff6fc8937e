"""A protected training with diffusers and PEFT: in a loop of one's own, and behind the launcher."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ...shared.files.storage import replace_atomically
from ...shared.models.adapter import PipelineDenoiser
from ...shared.training.concept.text_states import pipeline_text_path
from ...shared.training.filter.sample_log import Sample
from ...shared.training.projection.factors import UnsupportedTraining, projected_factors
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from ...shared.training.settings import ProtectionSettings
from ..hooks import (
    accelerate_hooks,
    distribution_faults,
    finish,
    optimizer_hooks,
    processes_of,
    refuse,
)
from ..options import settings_from
from ..typed import refuse_unknown
from .adapter import Samples, StepAdapter
from .data import EmptyPrompt, text_encoders

TEXT_PROJECTIONS = ("caption_projection", "encoder_hid_proj")
"""Modules of networks between the text encoder's states and the layers that read text."""


class ProtectedLoop:
    """What a loop sets and calls while it is protected; see `protect`."""

    def __init__(self, protection: Protection):
        self.protection = protection
        self.samples: Sequence[Sample | str | Path] = ()
        """Those in the next batch, for the report; samples or files. Set it in each step, or
        captions are distinguished by what the text encoder makes of them."""
        self._adapter: StepAdapter | None = None

    def target(self, target: Tensor, latents: Tensor) -> Tensor:
        """Return what a step teaches: with `project_regions`, nothing where the concept shows.

        Call it between the network's prediction and the loss. Without `project_regions` the target
        comes back as it is.

        Args:
            target: What the loop would teach, [sample channel height width].
            latents: Clean ones, in the network's scale, of the same shape.

        Raises:
            UnsupportedTraining: `samples` have no captions.
        """
        if not self.protection.base_targets:
            return target
        return self._adapter.target(target, latents, self._named())

    def stamp(self, path: str | Path) -> None:
        """Write into a saved LoRA's header how it was trained, and check the LoRA.

        Raises:
            ProjectionFailed: One of its factors reaches into the prohibited subspace.
        """
        stamp(Path(path), self.protection)

    def _named(self) -> Sequence[Sample]:
        return [
            each if isinstance(each, Sample) else Sample(file=str(each)) for each in self.samples
        ]


@contextmanager
def protect(
    pipeline: Any,
    optimizer: Optimizer,
    *,
    output: str | Path,
    captions: Sequence[str] = (),
    accelerator: Any = None,
    **options: Any,
) -> Iterator[ProtectedLoop]:
    """Protect the training of a LoRA on a pipeline's network for as long as the block lasts.

        with protect(pipeline, optimizer, output="lora.safetensors", mem_filter="x1.5") as loop:
            for batch in loader:
                loop.samples = batch["file"]
                ...  # forward, loss, backward and step as ever

    A block that ends well checks that samples were seen and steps projected, and writes the list
    of the most memorized samples next to `output`.

    Args:
        pipeline: Of diffusers; its `unet` or `transformer` carries the LoRA already
            (`add_adapter`), its text encoders are not trained. With concept subtraction alone they
            may be, and the network may be fine-tuned without a LoRA.
        optimizer: That trains the LoRA, as torch made it or as accelerate prepared it.
        output: The LoRA file to be saved; `ProtectedLoop.stamp` it when it is.
        captions: Of the training set, which the projection must leave alone.
        accelerator: Of accelerate, where the loop has one. Then gradients are projected before
            `clip_grad_norm_`, `log` gets our values, `save_state` and `load_state` ours too.
        **options: As on the command line of the launchers: `project_concepts`, `mem_filter` and
            the others of `options.OPTIONS`.

    Raises:
        OptionError: An option cannot be understood.
        UnsupportedTraining: What is trained cannot be protected.
        ConceptNotSeparable: The concept's subspace fails its acceptance test.
        ProtectionFailed: At the end, something that was requested had not happened.
    """
    refuse_unknown(options, prefixes=("",))
    settings = settings_from(options)
    denoiser = PipelineDenoiser(pipeline)
    network = denoiser.family.network
    refuse(faults_of(network, settings, accelerator))
    settings.check_files()
    several = {} if accelerator is None else processes_of(accelerator)
    protection = Protection(settings, output=Path(output), **several)
    loop = ProtectedLoop(protection)
    optimizers = [getattr(optimizer, "optimizer", optimizer)]
    if (settings.filter or settings.projection) and trains_text(denoiser, optimizers):
        refuse(["a text encoder is trained; filter and projection take its states as they were: "
                "leave out mem_* and project_*; subtract_concepts works with it"])  # fmt: skip
    with ExitStack() as undo:
        loop._adapter = undo.enter_context(
            protected(
                protection,
                network,
                optimizers,
                denoiser,
                captions=captions,
                samples=loop._named,
                trains_text=trains_text(denoiser, optimizers),
            )
        )
        if accelerator is not None:
            undo.enter_context(accelerate_hooks(accelerator, protection))
        yield loop
        finish(protection, accelerator)


def trains_text(denoiser: PipelineDenoiser, optimizers: Sequence[Optimizer]) -> bool:
    """Return whether an optimizer trains a pipeline's text encoders."""
    trained = {id(each) for each in _trained_by(optimizers)}
    parts = text_encoders(denoiser.pipeline)
    return any(id(each) in trained for part in parts for each in part.parameters())


def _trained_by(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [each for o in optimizers for group in o.param_groups for each in group["params"]]


def faults_of(
    network: nn.Module, settings: ProtectionSettings, accelerator: Any = None
) -> Iterator[str]:
    """Yield why a training cannot be protected, before anything is loaded or changed for it."""
    projection = settings.projection
    if accelerator is not None:
        yield from distribution_faults(accelerator)
        compiler = str(accelerator.state.dynamo_plugin.backend).rpartition(".")[2]
        if settings.predicts_again and compiler != "NO":
            yield f"hooks of the network are not compiled by {compiler}: --dynamo_backend no"
    if (
        projection
        and projection.of_text
        and any(getattr(network, name, None) is not None for name in TEXT_PROJECTIONS)
    ):
        yield (
            f"the layers of {type(network).__name__} read text through a projection of its own, so "
            "no subspace of text states can be kept out exactly: leave out --project_concepts"
        )
    elif projection:
        try:
            layers = projection.layer_subspaces()
            projected_factors(network, text=projection.of_text, layers=layers)
        except UnsupportedTraining as error:
            yield str(error).removesuffix(".")


@contextmanager
def protected(
    protection: Protection,
    network: nn.Module,
    optimizers: Sequence[Optimizer],
    denoiser: PipelineDenoiser,
    *,
    captions: Sequence[str],
    samples: Samples,
    prediction_type: str | None = None,
    prior_preservation: bool = False,
    trains_text: bool = False,
) -> Iterator[StepAdapter]:
    """Protect a training from the LoRA's first step to its last.

    Args:
        protection: That nothing was done with yet.
        network: That carries the LoRA; not what wraps it for several processes.
        optimizers: Of torch; one of them trains the LoRA.
        denoiser: The same model's text side.
        captions: Of the training set.
        samples: See `StepAdapter`, as the others.
        prediction_type: Of the training, where it is not the scheduler's.
        prior_preservation: The second half of each batch are class images.
        trains_text: Text encoders are trained, which concept subtraction alone covers.

    Raises:
        UnsupportedTraining: The projection would not be exact for what is trained.
        ConceptNotSeparable: The concept's subspace fails its acceptance test.
        NothingSubtracted: No caption names a concept to subtract.
    """
    with ExitStack() as undo:
        with aside(RandomState.now(network.device)):
            protection.fit(pipeline_text_path(denoiser), captions)
            empty = EmptyPrompt.of(denoiser, prediction_type) if protection.filter else None
            adapter = StepAdapter(
                network, protection, empty, samples, denoiser=denoiser,
                prior_preservation=prior_preservation, trains_text=trains_text,
                trained=_trained_by(optimizers),
            )  # fmt: skip
        protection.protect(network)
        undo.enter_context(optimizer_hooks(optimizers, protection))
        if protection.settings.predicts_again:
            undo.enter_context(adapter.attached())
        protection.start()
        yield adapter


def stamp(path: Path, protection: Protection) -> None:
    """Write into a saved LoRA's header how it was trained, project it in its own precision, check.

    Raises:
        ProjectionFailed: One of its factors reaches into the subspace.
        ModelError: It is no LoRA whose text side can be checked.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    protection.clear_rounding(tensors, source=str(path))
    with replace_atomically(path) as part:
        save_file(tensors, part, metadata=metadata | protection.metadata())
    protection.after_save(path)
