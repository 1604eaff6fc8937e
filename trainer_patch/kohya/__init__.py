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

from ...shared.training.projection.factors import UnsupportedTraining
from ...shared.training.protection import Protection
from ..hooks import ending_in_one_line
from ..options import NAMES
from .checks import check_training
from .data import discards_text
from .hooks import install
from .request import BASE_MODULE, Request, read_request
from .training import Training

launched: list[Request] = []
"""What the launcher has read of its command, for the training that it starts in this process."""
installed: list[Protection] = []
"""Of the trainings in this process whose network was made; the launcher looks at its end."""


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: torch.nn.Module,
    text_encoder: Any,
    unet: torch.nn.Module,
    **kwargs: Any,
) -> torch.nn.Module:
    """Make the base module's network and protect the training; called by sd-scripts.

    Raises:
        SystemExit: An option cannot be understood, the combination or the version of sd-scripts is
            not supported; the message says what to type.
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
) -> torch.nn.Module:
    """Return a network with the hooks in place, or refuse before it is made.

    Args:
        caller: The trainer's `train`.
        kwargs: Network arguments, ours among them.
        make: Makes the network from the base module and its own arguments.
        protect: Put the hooks in place.
    """
    with ending_in_one_line():
        training = Training.of_caller(caller)
        args, trainer = training.args, type(training.trainer)
        request = launched[0] if launched else read_request(args, trainer)
        base = importlib.import_module(request.base_module)
        if protect:
            check_training(trainer, args, request)
            if discards_text(trainer, args) and not request.empty:
                raise UnsupportedTraining(
                    f"{trainer.__name__} has thrown its text encoders away: use the launcher, "
                    "python -m unmemorize.trainer_patch.kohya, or leave out "
                    "--cache_text_encoder_outputs."
                )
        own = kwargs | dict(request.network_args) if protect else kwargs
        network = make(base, {k: own[k] for k in own if k not in (*NAMES, BASE_MODULE)})
        if protect:
            if network is None:  # sd-scripts would end there, and say nothing
                raise UnsupportedTraining(f"{request.base_module} made no network.")
            installed.append(install(training, network, request))
        return network
