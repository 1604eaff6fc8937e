"""What a protected training of sd-scripts leaves behind: LoRA files, and states to resume from."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...shared.training.protection import Protection
from ..checkpoints import STATE, save_progress
from ..options import NAMES
from .training import Training

BASE_MODULE = "base_module"
"""Network argument: the module that this one stands in front of."""


def wrap_saving(
    training: Training,
    protection: Protection,
    save: Callable[..., None],
    base_module: str,
    finish: Callable[[], None],
) -> Callable[..., None]:
    """Return a network's `save_weights` that saves projected weights, tells of it and checks it.

    Args:
        training: Whose last file has the name of the output.
        protection: Of the training.
        save: The network's own.
        base_module: Which module made the network.
        finish: Called when the last file stands; what it raises ends the training in error.
    """

    def save_weights(file: str, dtype: Any, metadata: dict[str, str] | None) -> None:
        protection.before_save()
        told = _of_base(metadata or {}, base_module, training.args.network_args or ())
        save(file, dtype, told if training.args.no_metadata else told | protection.metadata())
        protection.after_save(Path(file))
        if Path(file).stem == output_of(training).name:
            finish()

    return save_weights


def output_of(training: Training) -> Path:
    """Return where the last file of a training goes, without its suffix."""
    args = training.args
    return Path(args.output_dir) / (args.output_name or "last")


def keep_state(training: Training, protection: Protection) -> None:
    """Save and load what a resumed training needs with the trainer's own state."""

    def save(_models: Any, _weights: Any, folder: str) -> None:
        protection.before_save()
        save_progress(protection, Path(folder))

    def load(_models: Any, folder: str) -> None:
        path = Path(folder) / STATE
        if path.is_file():
            protection.load_state_dict(json.loads(path.read_text("utf-8")))

    training.accelerator.register_save_state_pre_hook(save)
    training.accelerator.register_load_state_pre_hook(load)


def _of_base(
    metadata: Mapping[str, str], base_module: str, network_args: Sequence[str]
) -> dict[str, str]:
    """Return metadata as if the base module had been asked for: the file is one of its own."""
    told = dict(metadata) | {"ss_network_module": base_module}
    ours = (*NAMES, BASE_MODULE)
    if "ss_network_args" in told:
        # The trainer adds its dropout to what was given, and tells neither if nothing was.
        if all(pair.split("=")[0] in ours for pair in network_args):
            del told["ss_network_args"]
        else:
            given = json.loads(told["ss_network_args"])
            told["ss_network_args"] = json.dumps({k: given[k] for k in given if k not in ours})
    return told
