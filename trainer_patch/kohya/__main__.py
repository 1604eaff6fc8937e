"""The launcher: a training script of sd-scripts with the options in front of it."""

import argparse
import importlib
import importlib.util
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ...shared.patching import Function, HookMissing, patched
from ...shared.training.projection.factors import UnsupportedTraining
from ..hooks import ending_in_one_line, first_step_checked
from ..typed import read_command
from . import installed, launched
from .checks import check_training
from .data import discards_text, keeping_empty
from .request import BASE_MODULE, MODULE, read_request
from .training import VERSIONS

READ = "read_config_from_file"
"""Function by which a script completes its arguments, before it makes its trainer."""
CACHING = "cache_text_encoder_outputs_if_needed"
"""Method of a trainer by which it caches text."""
READERS = ("library.args", "library.train_util")
"""Modules by which scripts call it: the second up to v0.10, the first since."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a training script of sd-scripts with the options in front of it."""
    with ending_in_one_line():
        given, sys.argv = read_command(
            sys.argv[1:] if arguments is None else arguments,
            start=f"accelerate launch -m {MODULE}", host="sd-scripts",
            scripts="train_network.py, sdxl_train_network.py or another *_train_network.py",
        )  # fmt: skip
        with _delivered(given):
            runpy.run_path(sys.argv[0], run_name="__main__")


@contextmanager
def _delivered(given: Mapping[str, Any]) -> Iterator[None]:
    """Have the script's arguments hold the options, and this package for their network module.

    Raises:
        HookMissing: At an optimizer's first step, or when the block ends, nothing is protected.
    """
    undo = ExitStack()

    def wrap(read: Function) -> Function:
        def read_config_from_file(args: argparse.Namespace, *rest: Any) -> argparse.Namespace:
            args = read(args, *rest)
            vars(args).update(given)
            # The script's own names: it defines its trainer before it reads its arguments.
            trainer = _trainer_in(sys._getframe(1).f_globals)
            request = read_request(args, trainer)
            check_training(trainer, args, request)
            launched[:] = [request]
            if discards_text(trainer, args):
                keeping = patched(trainer, CACHING, keeping_empty(request.empty))
                undo.enter_context(keeping)
            setattr(args, BASE_MODULE, request.base_module)
            args.network_module = MODULE
            return args

        return read_config_from_file

    with undo:
        for reader in _readers():
            undo.enter_context(patched(reader, READ, wrap))
        undo.enter_context(first_step_checked(_check_made))
        yield
    _check_made()
    if installed[0].process == 0 and not installed[0].finished:  # the first process saves
        installed[0].withdraw()
        raise HookMissing(
            f"{sys.argv[0]} ended without saving its LoRA as --output_name says, so nothing could "
            f"be checked. Known to work: {VERSIONS}."
        )


def _readers() -> list[Any]:
    """Return the modules of this sd-scripts by which a script can call the function."""
    found = []
    for name in READERS:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise  # a package that sd-scripts needs
            continue
        found += [module] if hasattr(module, READ) else []
    if not found:
        raise HookMissing(
            f"This is no folder of a supported sd-scripts: {' and '.join(READERS)} have no {READ}. "
            f"Known to work: {VERSIONS}."
        )
    return found


def _trainer_in(names: Mapping[str, Any]) -> type:
    """Return the trainer class that a script defines.

    Raises:
        UnsupportedTraining: It defines none.
    """
    for each in names.values():
        own = isinstance(each, type) and each.__module__ == names["__name__"]
        if own and any(base.__name__ == "NetworkTrainer" for base in each.__mro__):
            return each
    raise UnsupportedTraining(
        f"{sys.argv[0]} trains no network that could be protected: take train_network.py, "
        "sdxl_train_network.py or another *_train_network.py of sd-scripts."
    )


def _check_made() -> None:
    """Raise HookMissing unless the script has made its network by this package."""
    if not launched:
        raise HookMissing(
            f"{sys.argv[0]} never called {READ} of {' or '.join(READERS)}, by which it gets the "
            f"options: nothing was protected. Known to work: {VERSIONS}."
        )
    if not installed:
        raise HookMissing(
            f"{sys.argv[0]} made no network by {MODULE}: nothing was protected. Is there a "
            f"training set? Known to work: {VERSIONS}."
        )


if __name__ == "__main__":
    main()
