"""Puts projection and filter into a training of sd-scripts, and takes them out at its end."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...shared.patching import Function, patched
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from ...shared.training.settings import ProtectionSettings
from ..hooks import STATE, calling, save_progress
from ..options import NAMES
from .adapter import StepAdapter
from .data import BatchSamples, TextSide
from .training import BASE_MODULE, STEP, Training, check_network

logger = logging.getLogger(__name__)


def install(
    training: Training, network: torch.nn.Module, settings: ProtectionSettings, base_module: str
) -> None:
    """Hook both methods into a training that has just made its network.

    Args:
        training: Its text encoders are still as they were loaded.
        network: Not yet applied to the model.
        settings: Those of the user.
        base_module: Which module made the network.

    Raises:
        HookMissing: The version of sd-scripts is not supported.
        ConceptNotSeparable: The concept's subspace fails its acceptance test.
    """
    check_network(network)
    accelerator, args = training.accelerator, training.args
    output = Path(args.output_dir) / (args.output_name or "last")
    protection = Protection(
        settings,
        output=output,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        gather=_gather,
        span=(float(args.min_timestep or 0), float(args.max_timestep or 1000)),
    )
    undo = ExitStack()
    if settings:
        with aside(RandomState.now(accelerator.device)):
            _hook_steps(training, network, protection, undo)
        _keep_state(accelerator, protection)

    def finish() -> None:
        undo.close()
        protection.finish()

    def saving(save: Function) -> Function:
        def save_weights(file: str, dtype: Any, metadata: dict[str, str] | None) -> None:
            protection.before_save()
            own = _of_base(metadata or {}, base_module, args.network_args or ())
            save(file, dtype, own if args.no_metadata else own | protection.metadata())
            protection.after_save(Path(file))
            if Path(file).stem == output.name:
                finish()  # what it raises ends the training in error

        return save_weights

    network.save_weights = saving(network.save_weights)


def _hook_steps(
    training: Training, network: torch.nn.Module, protection: Protection, undo: ExitStack
) -> None:
    """Wrap what the trainer calls in and around its steps."""
    trainer, accelerator, text = training.trainer, training.accelerator, TextSide(training)
    samples = BatchSamples(training.dataset)
    protection.fit(text.states, samples.captions)

    def hook(owner: Any, name: str, wrap: Callable[[Function], Function]) -> None:
        undo.enter_context(patched(owner, name, wrap))

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

    def start_epoch() -> None:
        protection.start()  # a resumed or loaded LoRA is in place only now
        values = ", ".join(f"{name} {value:.3g}" for name, value in protection.scalars().items())
        logger.info("%s", values or "Projection and filter are in place.")

    def with_scalars(generate: Function) -> Function:
        return lambda *args, **kwargs: generate(*args, **kwargs) | protection.scalars()

    if protection.filter or protection.base_targets:
        adapter = StepAdapter(training, protection, samples, text, network)
    if protection.filter:
        hook(trainer, training.predicts, adapter.with_weights)
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
            protection.load_state_dict(json.loads(path.read_text("utf-8")))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _of_base(
    metadata: Mapping[str, str], base_module: str, network_args: Sequence[str]
) -> dict[str, str]:
    """Return the metadata that the base module alone would have led to: the file is its own."""
    own = dict(metadata) | {"ss_network_module": base_module}
    ours = (*NAMES, BASE_MODULE)
    if "ss_network_args" in own:
        # The trainer adds its dropout to what was given, and writes neither if nothing was.
        if all(pair.split("=")[0] in ours for pair in network_args):
            del own["ss_network_args"]
        else:
            given = json.loads(own["ss_network_args"])
            own["ss_network_args"] = json.dumps({k: given[k] for k in given if k not in ours})
    return own
