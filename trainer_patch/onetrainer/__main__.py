"""Projection and memorization filter in OneTrainer, which stays unmodified.

In OneTrainer's folder, in front of the script that trains or of the one that opens the window:

    python -m unmemorize.trainer_patch.onetrainer scripts/train.py --config-path config.json \
        --project_concepts "mickey mouse, mickey -> a character" --mem_filter x1.5
    python -m unmemorize.trainer_patch.onetrainer scripts/train_ui.py --mem_filter x1.5

The options may also be keys of the configuration, or go into `--config-value`.
"""

import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ...shared.patching import Function, HookMissing, patched
from ..hooks import ending_in_one_line, first_step_checked
from ..typed import read_command
from .checks import option_keys
from .training import MODULE, attach

SCRIPT = "train.py"
"""Trains once; the window may be closed without a training."""
TRAINER = "modules/trainer/GenericTrainer.py"
"""A file by which OneTrainer's folder is known."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a script of OneTrainer; every training that it starts is protected."""
    with ending_in_one_line():
        given, sys.argv = read_command(
            sys.argv[1:] if arguments is None else arguments,
            start=f"python -m {MODULE}", host="OneTrainer",
            scripts="scripts/train.py or scripts/train_ui.py", known_by=TRAINER,
        )  # fmt: skip
        _show_log()
        loaded = _load(Path(sys.argv[0]))
        with attached(given) as trainers:
            loaded.main()
        if Path(sys.argv[0]).name == SCRIPT and not trainers:
            _refuse_unknown_version()


@contextmanager
def attached(given: dict[str, Any]) -> Iterator[list[Any]]:
    """Protect every training that OneTrainer begins, for as long as the block lasts.

    Args:
        given: Options by name, before those of the training's configuration.

    Yields:
        The trainers made so far.

    Raises:
        HookMissing: This version of OneTrainer is not supported.
    """
    from modules.util import create
    from modules.util.config.TrainConfig import TrainConfig

    trainers: list[Any] = []

    def check_made() -> None:
        if not trainers:
            _refuse_unknown_version()

    def protected(original: Function) -> Function:
        def create_trainer(*args: Any, **kwargs: Any) -> Any:
            trainer = original(*args, **kwargs)
            attach(trainer, given)
            trainers.append(trainer)
            return trainer

        return create_trainer

    with (
        option_keys(TrainConfig),
        patched(create, "create_trainer", protected),
        first_step_checked(check_made),
    ):
        yield trainers


def _refuse_unknown_version() -> NoReturn:
    raise HookMissing(
        "OneTrainer never called modules.util.create.create_trainer: this version is not "
        "supported, and nothing was protected."
    )


def _load(script: Path) -> ModuleType:
    """Return a script that has imported what it needs and waits for its `main` to be called."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    if not hasattr(loaded, "main"):
        raise HookMissing(f"{script} has no `main`: this version of OneTrainer is not supported.")
    return loaded


def _show_log() -> None:
    """Show once what this package logs: only OneTrainer's window shows logs of others."""
    log = logging.getLogger(MODULE.partition(".")[0])
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    log.propagate = False


if __name__ == "__main__":
    main()
