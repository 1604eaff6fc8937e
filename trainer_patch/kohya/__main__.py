"""The launcher: a training script of sd-scripts with the options in front of it."""

import argparse
import importlib
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from ...shared.patching import HookMissing
from ..options import read_command, settings_from
from .training import BASE_MODULE, check_arguments

MODULE = __spec__.parent
"""The network module's name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a training script of sd-scripts with the options in front of it."""
    given, sys.argv = read_command(
        sys.argv[1:] if arguments is None else arguments,
        start=f"accelerate launch -m {MODULE}", host="sd-scripts",
        scripts="train_network.py, sdxl_train_network.py or another *_train_network.py",
    )  # fmt: skip
    _deliver(given)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _deliver(given: dict[str, Any]) -> None:
    """Have the script's arguments hold the options, and this package for their network module."""
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
