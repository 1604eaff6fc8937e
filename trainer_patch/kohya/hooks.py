"""Puts projection and filter into a training of sd-scripts, and takes them out at its end."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...shared.patching import patched
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from ...shared.training.settings import ProtectionSettings
from .filter import StepFilter
from .regions import StepRegions
from .samples import BatchSamples
from .saving import keep_state, output_of, wrap_saving
from .text import TextSide
from .training import Training, check_network

logger = logging.getLogger(__name__)


def install(
    training: Training, network: torch.nn.Module, settings: ProtectionSettings, base_module: str
) -> None:
    """Hook both methods into a training that has just made its network.

    Args:
        training: Its text encoders are still as they were loaded.
        network: Not yet applied to the model.
        settings: What is asked for.
        base_module: Which module made the network.

    Raises:
        HookMissing: The version of sd-scripts is not supported.
        ConceptNotSeparable: The concept's subspace fails its acceptance test.
    """
    check_network(network)
    accelerator, args = training.accelerator, training.args
    protection = Protection(
        settings,
        output=output_of(training),
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        gather=_gather(training),
        span=(float(args.min_timestep or 0), float(args.max_timestep or 1000)),
    )
    undo = ExitStack()
    if settings:
        with aside(RandomState.now(accelerator.device)):
            _hook_steps(training, network, protection, undo)
        keep_state(training, protection)

    def finish() -> None:
        undo.close()
        protection.finish()

    save = wrap_saving(training, protection, network.save_weights, base_module, finish)
    network.save_weights = save


def _hook_steps(
    training: Training, network: torch.nn.Module, protection: Protection, undo: ExitStack
) -> None:
    """Wrap what the trainer calls in and around its steps."""
    trainer, text = training.trainer, TextSide(training)
    samples = BatchSamples(training.dataset)
    protection.fit(text.states, samples.captions)
    if protection.filter:
        name, predict = StepFilter(training, protection, samples, text).wrap()
        _replace(trainer, name, predict, undo)
        _replace(training.accelerator, "end_training", _before(
            lambda: _meet(training, protection), training.accelerator.end_training
        ), undo)  # fmt: skip

    if protection.base_targets:
        regions = StepRegions(training, protection.base_targets, samples, text, network)
        _replace(trainer, *regions.wrap(), undo)

    def protect() -> None:
        protection.protect(network)
        ours = {id(parameter) for parameter in network.parameters()}

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
                protection.after_step()

        undo.callback(register_optimizer_step_post_hook(after_step).remove)

    def start_epoch() -> None:
        protection.start()  # a resumed or loaded LoRA is in place only now
        told = ", ".join(f"{name} {value:.3g}" for name, value in protection.scalars().items())
        logger.info("%s", told or "Projection and filter are in place.")

    def with_scalars(*args: Any, **kwargs: Any) -> dict[str, float]:
        return generate(*args, **kwargs) | protection.scalars()

    generate = trainer.generate_step_logs
    _replace(trainer, "generate_step_logs", with_scalars, undo)
    _replace(trainer, "all_reduce_network", _after(
        trainer.all_reduce_network, protection.before_clip
    ), undo)  # fmt: skip
    _replace(network, "prepare_grad_etc", _after(network.prepare_grad_etc, protect), undo)
    _replace(network, "on_epoch_start", _after(network.on_epoch_start, start_epoch), undo)


def _gather(training: Training) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return how rows of every process come together."""

    def gather(rows: torch.Tensor) -> torch.Tensor:
        from accelerate.utils import gather_object

        # As objects: at the end of an epoch batches differ in size.
        return torch.tensor(gather_object(rows.tolist()), dtype=rows.dtype)

    return gather


def _meet(training: Training, protection: Protection) -> None:
    """Write every process's records before the first one ranks them all."""
    protection.flush()
    training.accelerator.wait_for_everyone()


def _after(original: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        then()
        return result

    return called


def _before(first: Callable[[], None], original: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        first()
        return original(*args, **kwargs)

    return called


def _replace(owner: Any, name: str, method: Callable[..., Any], undo: ExitStack) -> None:
    """Put a method over the owner's own until the stack unwinds."""
    undo.enter_context(patched(owner, name, lambda original: method))
