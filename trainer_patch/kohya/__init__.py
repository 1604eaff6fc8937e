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
    training, base, given = _asked(sys._getframe(1))
    rest = _without_ours(kwargs)
    sizes = (multiplier, network_dim, network_alpha)

    def make() -> torch.nn.Module | None:
        return base.create_network(*sizes, vae, text_encoder, unet, **rest)

    return _protected(training, base, given, make)


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
    training, base, given = _asked(sys._getframe(1))
    rest = _without_ours(kwargs)
    loaded = []

    def make() -> torch.nn.Module:
        network, weights = base.create_network_from_weights(
            multiplier, file, vae, text_encoder, unet,
            weights_sd=weights_sd, for_inference=for_inference, **rest,
        )  # fmt: skip
        loaded.append(weights)
        return network

    network = make() if for_inference else _protected(training, base, given, make)
    return network, loaded[0]


def _asked(frame: FrameType) -> tuple[Training, ModuleType, dict[str, Any]]:
    """Return the training of a caller, its base module, and the options it was given."""
    training = Training.of_caller(frame)
    pairs = dict(pair.split("=", 1) for pair in training.args.network_args or ())
    refuse_unknown(pairs)
    base = pairs.get(BASE_MODULE, getattr(training.args, BASE_MODULE, PLAIN))
    given = {name: getattr(training.args, name, None) for name in NAMES}
    given |= {name: pairs[name] for name in NAMES if name in pairs}
    return training, importlib.import_module(base), given


def _protected(
    training: Training,
    base: ModuleType,
    given: dict[str, Any],
    make: Callable[[], torch.nn.Module | None],
) -> torch.nn.Module | None:
    """Return a network with the hooks in place, or refuse before it is made."""
    settings = settings_from(given)
    check_arguments(training.args, settings)
    check_training(training, settings)
    network = make()
    if network is not None:
        install(training, network, settings, base.__name__)
    return network


def _without_ours(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in kwargs if key not in (*NAMES, BASE_MODULE)}
