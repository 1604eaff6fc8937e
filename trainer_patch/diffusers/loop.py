"""One's own training loop with PEFT and diffusers, protected in three lines."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ...shared.models.adapter import PipelineDenoiser
from ...shared.training.filter.sample_log import Sample
from ...shared.training.protection import Protection
from ..hooks import accelerate_hooks, gather_of
from ..options import NAMES, OptionError, settings_from
from .regions import SparedTargets
from .saving import stamp
from .session import protected, validate


class ProtectedLoop:
    """What a loop may tell and ask while it is protected; see `protect`."""

    def __init__(self, protection: Protection):
        self.protection = protection
        self.samples: Sequence[Sample | str | Path] = ()
        """Who is in the next batch, for the report; samples or files. Set it in each step, or
        captions are told apart by what the text encoder makes of them."""
        self._spared: SparedTargets | None = None

    def target(self, target: Tensor, latents: Tensor) -> Tensor:
        """Return what a step teaches: with `project_regions`, nothing where the concept shows.

        Asked between the network's prediction and the loss. Whatever is not asked for costs
        nothing, and the target comes back as it is.

        Args:
            target: What the loop would teach, [sample channel height width].
            latents: Clean ones, in the network's scale, of the same shape.

        Raises:
            UnsupportedTraining: `samples` tell no captions.
        """
        return self._spared.target(target, latents, self._named()) if self._spared else target

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
            (`add_adapter`), its text encoders are not trained.
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
        ProtectionFailed: At the end, something that was asked for had not happened.
    """
    if unknown := sorted(options.keys() - set(NAMES)):
        raise OptionError(f"`{unknown[0]}` is not an option; there are {', '.join(NAMES)}.")
    settings = settings_from(options)
    denoiser = PipelineDenoiser(pipeline)
    network = denoiser.family.network
    validate(network, settings, accelerator)
    several = {} if accelerator is None else {
        "process": accelerator.process_index,
        "processes": accelerator.num_processes,
        "gather": gather_of(accelerator),
    }  # fmt: skip
    protection = Protection(settings, output=Path(output), **several)
    loop = ProtectedLoop(protection)
    with ExitStack() as undo:
        undo.enter_context(
            protected(
                protection,
                network,
                [getattr(optimizer, "optimizer", optimizer)],
                denoiser,
                captions=captions,
                samples=loop._named,
            )
        )
        if accelerator is not None:
            undo.enter_context(accelerate_hooks(accelerator, lambda: protection))
        if protection.base_targets:
            loop._spared = SparedTargets(network, denoiser, protection.base_targets)
            undo.enter_context(loop._spared.attached())
        yield loop
        protection.flush()
        if accelerator is not None:
            accelerator.wait_for_everyone()
        if accelerator is None or accelerator.is_main_process:
            protection.finish()
