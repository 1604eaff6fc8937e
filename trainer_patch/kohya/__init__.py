"""Projection and memorization filter in kohya's sd-scripts, which stay unmodified.

Two doors to the same thing. In the folder of sd-scripts, as a launcher:

    accelerate launch -m unmemorize.trainer_patch.kohya train_network.py <usual arguments> \
        --project_concepts "mickey mouse, mickey -> a character" --mem_filter x1.5

Or as a network module, where a program starts the training:

    --network_module unmemorize.trainer_patch.kohya --network_args base_module=networks.lora \
        "project_concepts=mickey mouse, mickey -> a character" mem_filter=x1.5

The options may also be keys of the file of --config_file, through both doors.
"""

import importlib
import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

import torch

from ..options import NAMES, refuse_unknown, settings_from
from .hooks import install
from .training import BASE_MODULE, Training, check_arguments, check_training

PLAIN = "networks.lora"
"""Which module makes the network when none is named."""


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: torch.nn.Module,
    text_encoder: Any,
    unet: torch.nn.Module,
    **kwargs: Any,
) -> torch.nn.Module | None:
    """Make the base module's network and protect the training; called by sd-scripts.

    Raises:
        OptionError: An option cannot be understood.
        UnsupportedTraining: The combination is not supported; the message says what to type.
        HookMissing: The version of sd-scripts is not supported.
    """
    sizes = (multiplier, network_dim, network_alpha)

    def make(base: ModuleType, rest: dict[str, Any]) -> torch.nn.Module | None:
        return base.create_network(*sizes, vae, text_encoder, unet, **rest)

    return _made(sys._getframe(1), kwargs, make)


def create_network_from_weights(
    multiplier: float,
    file: str,
    vae: torch.nn.Module,
    text_encoder: Any,
    unet: torch.nn.Module,
    weights_sd: dict[str, torch.Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Make the base module's network in the sizes of a file; called by sd-scripts.

    For inference (--base_weights) nothing is trained and nothing is protected.
    """
    loaded = []

    def make(base: ModuleType, rest: dict[str, Any]) -> torch.nn.Module:
        network, weights = base.create_network_from_weights(
            multiplier, file, vae, text_encoder, unet,
            weights_sd=weights_sd, for_inference=for_inference, **rest,
        )  # fmt: skip
        loaded.append(weights)
        return network

    return _made(sys._getframe(1), kwargs, make, protect=not for_inference), loaded[0]


def _made(
    caller: FrameType,
    kwargs: dict[str, Any],
    make: Callable[[ModuleType, dict[str, Any]], torch.nn.Module | None],
    *,
    protect: bool = True,
) -> torch.nn.Module | None:
    """Return a network with the hooks in place, or refuse before it is made.

    Args:
        caller: The trainer's `train`.
        kwargs: Network arguments, ours among them.
        make: Makes the network from the base module and its own arguments.
        protect: Put the hooks in place.
    """
    training = Training.of_caller(caller)
    args = training.args
    pairs = dict(pair.split("=", 1) for pair in args.network_args or ())
    refuse_unknown(pairs)
    base = importlib.import_module(pairs.get(BASE_MODULE, getattr(args, BASE_MODULE, PLAIN)))
    settings = None
    if protect:
        given = {name: pairs.get(name, getattr(args, name, None)) for name in NAMES}
        settings = settings_from(given)
        check_arguments(args, settings)
        check_training(training, settings)
    network = make(base, {k: kwargs[k] for k in kwargs if k not in (*NAMES, BASE_MODULE)})
    if settings is not None and network is not None:
        install(training, network, settings, base.__name__)
    return network
