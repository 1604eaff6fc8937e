"""What the results of both audits hold: the model, the versions, and values as strict JSON."""

import json
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("unmemorize", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The audited model."""

    name: str
    """Folder, file or hub id as the user gave it, without its parent folders."""
    fingerprint: str
    """sha256 over the weights, LoRA included."""
    lora: str | None
    """File name of the LoRA, if any, and its strength where that is not 1."""
    parametrization: str
    """epsilon, v_prediction or flow."""
    dtype: str
    device: str
    latent_shape: tuple[int, ...]
    guidance_distilled: bool


def versions() -> dict[str, str]:
    """Return the versions of everything that can move a score, by package."""
    numbers = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            numbers[package] = "not installed"
    if numbers["unmemorize"] == "not installed":  # a plain clone
        numbers["unmemorize"] = _version_of_clone()
    return numbers


def _version_of_clone() -> str:
    project = Path(__file__).parents[2] / "pyproject.toml"
    text = project.read_text("utf-8") if project.is_file() else ""
    match = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return match[1] if match else "unknown"


def finite(value: Any) -> Any:
    """Return `value` with NaN and infinities as None, which is all that JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    """Return strict JSON in UTF-8; characters that end lines or are unpaired stay escaped."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=indent)
    # Line separators split lines for many readers, lone surrogates cannot be written as UTF-8.
    return "".join(
        f"\\u{ord(c):04x}" if c in "\x85\u2028\u2029\x7f" or "\ud800" <= c <= "\udfff" else c
        for c in text
    )
