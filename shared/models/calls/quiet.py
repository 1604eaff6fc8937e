"""Libraries that talk while they work, silenced for a block and then as they were."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = ("diffusers", "transformers")


@contextmanager
def quiet() -> Iterator[None]:
    """Let diffusers and transformers report errors only, and draw no progress bars."""
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    talk = [sys.modules.get(f"{name}.utils.logging") for name in _LIBRARIES]
    bars = [module for module in talk if module is not None and module.is_progress_bar_enabled()]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for module in bars:
            module.disable_progress_bar()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module in bars:
            module.enable_progress_bar()
