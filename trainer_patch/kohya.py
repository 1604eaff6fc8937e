"""Projection and memorization filter in kohya's sd-scripts, which stay unmodified.

Two doors to the same thing. In the folder of sd-scripts, as a launcher:

    accelerate launch -m unmemorize.trainer_patch.kohya train_network.py <usual arguments> \
        --project_concepts "mickey mouse, mickey -> a character" --mem_filter x1.5

Or as a network module, where a program starts the training:

    --network_module unmemorize.trainer_patch.kohya --network_args base_module=networks.lora \
        "project_concepts=mickey mouse, mickey -> a character" mem_filter=x1.5

The options may also be keys of the file of --config_file, through both doors.
"""

import argparse
import importlib
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch

from .kohya_hooks import install
from .kohya_saving import BASE_MODULE
from .kohya_training import Training, check_arguments, check_training
from .options import NAMES, add_options, refuse_unknown, settings_from
from .wrapping import HookMissing

MODULE = __spec__.name
"""The network module's name, also where this file runs as the launcher."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a training script of sd-scripts with the options in front of it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog=f"accelerate launch -m {MODULE}",
        usage="%(prog)s SCRIPT <the script's arguments> [options]",
        description="Run train_network.py or sdxl_train_network.py of kohya's sd-scripts, or "
        "another *_train_network.py, as it is, with these options added. To be typed in the folder "
        "of sd-scripts. The options may also stand in the file of --config_file.",
        epilog="SCRIPT --help shows the script's own arguments.",
        allow_abbrev=False,
        add_help=arguments[:1] in ([], ["-h"], ["--help"]),
    )
    add_options(parser)
    options, rest = parser.parse_known_args(arguments)
    script = Path(rest[0]) if rest else None
    if script is None or not script.is_file():
        parser.error(
            f"there is no training script {script or ''} in {Path.cwd()}. Type: cd sd-scripts, "
            "then the same again with train_network.py or sdxl_train_network.py behind the module."
        )
    sys.argv = rest
    sys.path.insert(0, str(script.resolve().parent))
    given = {name: value for name, value in vars(options).items() if value}
    _deliver(given)
    runpy.run_path(str(script), run_name="__main__")


def _deliver(given: dict[str, Any]) -> None:
    """Have the script's arguments hold the options, and this file for their network module."""
    try:
        train_util = importlib.import_module("library.train_util")
        read = train_util.read_config_from_file
    except (ImportError, AttributeError) as error:
        raise HookMissing(f"This is no folder of a supported sd-scripts: {error}.") from error

    def read_config_from_file(args: argparse.Namespace, *rest: Any) -> argparse.Namespace:
        args = read(args, *rest)
        vars(args).update(given)
        settings = settings_from(vars(args))
        check_arguments(args, settings)
        if settings and args.network_module != MODULE:
            setattr(args, BASE_MODULE, args.network_module)
            args.network_module = MODULE
        return args

    train_util.read_config_from_file = read_config_from_file


if __name__ == "__main__":
    main()
