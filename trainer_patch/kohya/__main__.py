"""The launcher: a training script of sd-scripts with the options in front of it."""

import argparse
import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...shared.patching import HookMissing
from ..options import add_options, settings_from
from .training import BASE_MODULE, check_arguments

MODULE = __spec__.parent
"""The network module's name."""


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
