"""Puts the protection into a training of sd-scripts, and takes them out at its end."""

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...shared.patching import Function, patched
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from ...shared.training.state import READER
from ..hooks import (
    STATE,
    calling,
    end_in_time,
    ending_in_one_line,
    first_step_checked,
    save_progress,
)
from ..options import NAMES
from .adapter import StepAdapter
from .checks import check_network
from .data import BatchSamples, TextSide
from .request import BASE_MODULE, Request
from .training import STEP, Training

logger = logging.getLogger(__name__)


def install(training: Training, network: torch.nn.Module, request: Request) -> Protection:
    """Hook what is requested into a training that has just made its network.

    Args:
        training: Its text encoders are still as they were loaded.
        network: Not yet applied to the model.
        request: That of the user.

    Raises:
        HookMissing: The version of sd-scripts is not supported.
        ConceptNotSeparable: The concept's subspace fails its acceptance test.
    """
    check_network(network)
    accelerator, args = training.accelerator, training.args
    output = Path(args.output_dir) / (args.output_name or "last")
    protection = Protection(
        request.settings,
        output=output,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        gather=_gather,
        span=(float(args.min_timestep or 0), float(args.max_timestep or 1000)),
    )
    undo = ExitStack()
    if request.settings:
        with aside(RandomState.now(accelerator.device)):
            text = TextSide(training, request.empty)
            _hook_steps(training, network, protection, text, undo)
        _keep_state(accelerator, protection)

    def finish() -> None:
        undo.close()
        protection.finish()

    def ended() -> None:
        accelerator.end_training()
        finish()

    def saving(save: Function) -> Function:
        def save_weights(file: str, dtype: Any, metadata: dict[str, str] | None) -> None:
            protection.before_save()
            own = _of_base(metadata or {}, request)
            save(file, dtype, own if args.no_metadata else own | protection.metadata())
            with ending_in_one_line():
                protection.after_save(Path(file))
                if Path(file).stem == output.name:
                    finish()  # what it raises ends the training in error
                else:
                    end_in_time(protection, ended)

        return save_weights

    network.save_weights = saving(network.save_weights)
    return protection


def _hook_steps(
    training: Training, network: torch.nn.Module, protection: Protection, text: TextSide,
    undo: ExitStack,
) -> None:  # fmt: skip
    """Wrap what the trainer calls in and around its steps."""
    trainer, accelerator = training.trainer, training.accelerator
    samples = BatchSamples(training.dataset)
    protection.fit(text.states, samples.captions, samples.files)

    def hook(owner: Any, name: str, wrap: Callable[[Function], Function]) -> None:
        def wrapped(original: Function) -> Function:
            return ending_in_one_line()(wrap(original))

        undo.enter_context(patched(owner, name, wrapped))

    def meet() -> None:
        """Write every process's records before the first one ranks them all."""
        protection.flush()
        accelerator.wait_for_everyone()

    def protect() -> None:
        protection.protect(network)
        ours = {id(parameter) for parameter in network.parameters()}

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
                protection.after_step()

        undo.callback(register_optimizer_step_post_hook(after_step).remove)

    def check_first_step() -> None:
        with ending_in_one_line():
            protection.check_attached()

    def start_epoch() -> None:
        protection.start()  # a resumed or loaded LoRA is in place only now
        values = ", ".join(f"{name} {value:.3g}" for name, value in protection.scalars().items())
        logger.info("%s", values or "The protection is in place.")

    def with_scalars(generate: Function) -> Function:
        return lambda *args, **kwargs: generate(*args, **kwargs) | protection.scalars()

    undo.enter_context(first_step_checked(check_first_step))
    if protection.settings.predicts_again:
        adapter = StepAdapter(training, protection, samples, text, network)
    if protection.filter or protection.subtraction:
        hook(trainer, training.predicts, adapter.with_step)
    if protection.filter:
        hook(accelerator, "end_training", calling(before=meet))
    if protection.base_targets:
        hook(trainer, STEP, adapter.with_targets)
    hook(trainer, "generate_step_logs", with_scalars)
    hook(trainer, "all_reduce_network", calling(after=protection.before_clip))
    hook(network, "prepare_grad_etc", calling(after=protect))
    hook(network, "on_epoch_start", calling(after=start_epoch))


def _gather(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of every process, as objects: at an epoch's end batches differ in size."""
    from accelerate.utils import gather_object

    return torch.tensor(gather_object(rows.tolist()), dtype=rows.dtype)


def _keep_state(accelerator: Any, protection: Protection) -> None:
    """Save and load what a resumed training needs with the trainer's own state."""

    def save(_models: Any, _weights: Any, folder: str) -> None:
        protection.before_save()
        save_progress(protection, Path(folder))

    def load(_models: Any, folder: str) -> None:
        path = Path(folder) / STATE
        if path.is_file():
            protection.load_state_dict(READER.parse_file(path))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _of_base(metadata: Mapping[str, str], request: Request) -> dict[str, str]:
    """Return the metadata that the base module alone would have led to: the file is its own."""
    own = dict(metadata) | {"ss_network_module": request.base_module}
    if "ss_network_args" in own:
        given = json.loads(own.pop("ss_network_args"))
        # The trainer adds its dropout to what was given, and writes neither if nothing was.
        if request.network_args:
            known = (*request.network_args, *NAMES, BASE_MODULE)
            added = {k: v for k, v in given.items() if k not in known}
            own["ss_network_args"] = json.dumps(dict(request.network_args) | added)
    return own
