"""Optional packages: imported where used, and missed with a remedy."""

import importlib
from importlib.util import find_spec
from types import ModuleType


def has(module: str) -> bool:
    """Return whether `module` can be found, without importing it."""
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # a parent is missing, or it was put there half-made
        return False


def require(module: str, *, purpose: str, extra: str) -> ModuleType:
    """Import an optional package, or say who needs it and what to type.

    Args:
        module: Import name, dots allowed.
        purpose: What cannot be done without it, as the start of a sentence.
        extra: Name of the extra of this distribution that brings it.

    Raises:
        ImportError: When `module` is not installed, or fails while it is imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise ImportError(
            f"{purpose} needs the package `{missing.split('.')[0]}`, which is not installed. "
            f'Type: pip install "unmemorize[{extra}]"'
        ) from error
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs `{module}`, which is installed but does not import: {error}. "
            f'Type: pip install --upgrade "unmemorize[{extra}]"'
        ) from error
