"""Projection and memorization filter in OneTrainer, which stays unmodified.

In OneTrainer's folder, in front of the script that trains or of the one that opens the window:

    python -m unmemorize.trainer_patch.onetrainer scripts/train.py --config-path config.json \
        --project_concepts "mickey mouse, mickey -> a character" --mem_filter x1.5
    python -m unmemorize.trainer_patch.onetrainer scripts/train_ui.py --mem_filter x1.5

The options may also be keys of the configuration, or go into `--config-value`.
"""

import argparse
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ...shared.patching import Function, HookMissing, patched
from ..options import add_options
from .checks import option_keys
from .training import Training

MODULE = __spec__.parent
"""What is typed."""
TRAINER = Path("modules", "trainer", "GenericTrainer.py")
"""A file by which OneTrainer's folder is known."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a script of OneTrainer; every training that it starts is protected."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        usage="%(prog)s scripts/train.py <its usual arguments> [options]",
        description="Run scripts/train.py or scripts/train_ui.py of OneTrainer, as it is, with "
        "these options added. To be typed in OneTrainer's folder. The options may also be keys of "
        "the configuration file.",
        epilog="scripts/train.py --help shows the script's own arguments.",
        allow_abbrev=False,
        add_help=arguments[:1] in ([], ["-h"], ["--help"]),
    )
    add_options(parser)
    options, rest = parser.parse_known_args(arguments)
    script = Path(rest[0]) if rest else None
    if script is None or not script.is_file() or not TRAINER.is_file():
        parser.error(
            f"{Path.cwd()} is not OneTrainer's folder, or there is no script {script or ''} in it. "
            "Type: cd OneTrainer, then the same again with scripts/train.py or scripts/train_ui.py "
            "behind the module."
        )
    _show_log()
    sys.argv = rest
    sys.path.insert(0, str(script.resolve().parent))  # as Python does for a script
    loaded = _load(script)
    with attached({name: value for name, value in vars(options).items() if value}):
        loaded.main()


@contextmanager
def attached(given: dict[str, Any]) -> Iterator[None]:
    """Protect every training that OneTrainer begins, for as long as the block lasts.

    Args:
        given: Options by name, before those of the training's configuration.

    Raises:
        HookMissing: This version of OneTrainer is not supported.
    """
    from modules.util import create
    from modules.util.config.TrainConfig import TrainConfig

    def protected(original: Function) -> Function:
        def create_trainer(*args: Any, **kwargs: Any) -> Any:
            trainer = original(*args, **kwargs)
            Training(trainer, given).attach()
            return trainer

        return create_trainer

    with option_keys(TrainConfig), patched(create, "create_trainer", protected):
        yield


def _load(script: Path) -> ModuleType:
    """Return a script that has imported what it needs and waits for its `main` to be called."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    if not hasattr(loaded, "main"):
        raise HookMissing(f"{script} has no `main`: this version of OneTrainer is not supported.")
    return loaded


def _show_log() -> None:
    """Let what this package tells be seen once: only OneTrainer's window shows logs of others."""
    log = logging.getLogger(MODULE.partition(".")[0])
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    log.propagate = False


if __name__ == "__main__":
    main()
