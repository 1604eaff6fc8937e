"""One protected training with diffusers and PEFT, from the LoRA's first step to its last."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...shared.models.adapter import PipelineDenoiser
from ...shared.training.projection.factors import UnsupportedTraining, projected_factors
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from ...shared.training.settings import ProtectionSettings
from ..hooks import UNSUPPORTED_MODES, optimizer_hooks
from .gate import Gate, Samples
from .text import EmptyPrompt, text_path


def validate(network: nn.Module, settings: ProtectionSettings, accelerator: Any = None) -> None:
    """Refuse a training that cannot be protected, before anything is loaded or changed for it.

    Raises:
        UnsupportedTraining: With all reasons, and what to type instead.
    """
    faults = []
    if accelerator is not None:
        mode = str(accelerator.distributed_type).rpartition(".")[2]
        if mode in UNSUPPORTED_MODES:
            faults.append(f"{mode} cuts parameters up: use one process, or several with DDP.")
        compiler = str(accelerator.state.dynamo_plugin.backend).rpartition(".")[2]
        hooked = settings.filter or (settings.projection and settings.projection.regions)
        if hooked and compiler != "NO":
            faults.append(
                f"Hooks of the network are not compiled by {compiler}: --dynamo_backend no"
            )
    if asked := settings.projection:
        try:
            projected_factors(network, text=asked.of_text, layers=asked.layer_subspaces())
        except UnsupportedTraining as error:
            faults.append(str(error))
    if faults:
        raise UnsupportedTraining(" ".join(faults))


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
) -> Iterator[None]:
    """Protect a training for as long as the block lasts.

    Args:
        protection: That nothing was done with yet.
        network: That carries the LoRA; not what wraps it for several processes.
        optimizers: Of torch; one of them trains the LoRA.
        denoiser: The same model's text side, whose encoders are not trained.
        captions: Of the training set.
        samples: Who is in the batch; asked in each step.
        prediction_type: Of the training, where it is not the scheduler's.
        prior_preservation: The second half of each batch are class images.

    Raises:
        UnsupportedTraining: The projection would not be exact for what is trained.
        ConceptNotSeparable: The concept's subspace fails its acceptance test.
    """
    with ExitStack() as undo:
        with aside(RandomState.now(network.device)):
            protection.fit(text_path(denoiser), captions)
            empty = EmptyPrompt.of(denoiser, prediction_type)
        protection.protect(network)
        undo.enter_context(optimizer_hooks(optimizers, protection))
        if protection.filter:
            gate = Gate(network, protection, empty, samples, prior_preservation=prior_preservation)
            undo.enter_context(gate.attached())
        protection.start()
        yield
