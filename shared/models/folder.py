"""Diffusers folders read strictly: what a library would only warn about is refused and named."""

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..dependencies import require
from ..files.weights import ModelError
from ..wording import name_some
from .checks import (
    check_keys,
    check_memory,
    check_values,
    fill,
    plain,
    require_weights,
    variant_of,
    weight_files,
)
from .families import FAMILIES
from .families.undeclared import refusal
from .quiet import quiet

COMPONENTS = (
    "unet", "transformer", "transformer_2", "vae",
    "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4",
)  # fmt: skip
"""Parts with weights that a score or an image depends on."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "pe", "pe_tokenizer")
"""Parts that are not loaded: images are looked at as they come, prompts are read as they are."""
LEFT_OUT = ("text_encoder_3", "tokenizer_3")
"""T5, which Stable Diffusion 3 does without; diffusers saves nothing about it then, and asks."""
PURPOSE = "Running a diffusion model"


def _meant(folder: Path, files: Sequence[str]) -> str:
    """Return what a folder without model_index.json may be, and what to give in its place."""
    if "adapter_config.json" in files:
        lora = folder / "adapter_model.safetensors"
        return f"It holds a LoRA: give the model that it was trained on, and --lora {lora}."
    inside = sorted(folder.glob("*/model_index.json"))
    for model in (*inside[:1], folder.parent / "model_index.json"):
        if model.is_file():
            return f"Did you mean {model.parent}?"
    checkpoints = [name for name in files if name.endswith(".safetensors")]
    if checkpoints:
        return f"Did you mean {folder / checkpoints[0]}?"
    return "Give a diffusers folder, a .safetensors checkpoint, or a hub id of the form owner/name."


def read_index(folder: Path) -> dict[str, Any]:
    """Return model_index.json, or say what the folder is instead."""
    path = folder / "model_index.json"
    if not path.is_file():
        files = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        raise ModelError(
            f"{folder} is not a diffusers model: expected model_index.json and a folder for each "
            f"part in it, found {name_some(files) or 'nothing'}. {_meant(folder, files)}"
        )
    try:
        index = json.loads(path.read_text("utf-8"))
        name = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error!r}.") from error
    if name not in FAMILIES and (reason := _refusal(name)):
        raise ModelError(f"{path} describes a {name}: {reason}")
    return index


def _refusal(name: str) -> str:
    """Return why pipelines of a class that no family declares cannot be tried, "" if they can."""
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None:
        return f"this diffusers has no such pipeline; supported are {', '.join(FAMILIES)}."
    return refusal(cls)


def read_components(folder: Path) -> dict[str, tuple[str, str]]:
    """Return library and class of the parts with weights, those that no family names included."""
    index = read_index(folder)
    named = [name for name in COMPONENTS if index.get(name)]
    named += [
        name for name, part in index.items()
        if isinstance(part, list) and name not in (*COMPONENTS, *UNUSED)
        and weight_files(folder / name)
    ]  # fmt: skip
    parts = {name: tuple(index[name]) for name in named}
    return {name: part for name, part in parts.items() if part[0] is not None}


def load_folder(folder: Path, *, device: str, dtype: torch.dtype) -> Any:
    """Return the pipeline of a diffusers folder, every part of it checked."""
    import diffusers

    index, components = read_index(folder), read_components(folder)
    files = {name: require_weights(folder / name) for name in components}
    everything = [file for part in files.values() for file in part]
    for place in {"cpu", device}:  # weights pass through the CPU
        check_memory(everything, dtype, place)
    with quiet():
        loaded = {
            name: _load_component(folder / name, *components[name], files[name], dtype)
            for name in components
        }
        cls = getattr(diffusers, index["_class_name"])
        takes = inspect.signature(cls).parameters
        absent = {name: None for name in UNUSED if name in index}
        absent |= {
            name: None for name in LEFT_OUT
            if name in takes and not any(index.get(name, ())) and not (folder / name).exists()
        }  # fmt: skip
        try:
            return cls.from_pretrained(folder, local_files_only=True, **loaded, **absent)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{folder} could not be put together: {error}") from error


def _load_component(
    folder: Path, library: str, name: str, files: list[Path], dtype: torch.dtype
) -> torch.nn.Module:
    """Load one part and refuse it unless every parameter came from the file, and all of it."""
    if library not in ("diffusers", "transformers"):
        raise ModelError(
            f"{folder} asks for {library}.{name}: only classes of diffusers and transformers are "
            "loaded, others could run any program."
        )
    cls = getattr(require(library, purpose=PURPOSE, extra="models"), name, None)
    if cls is None:
        raise ModelError(f"{folder} asks for {library}.{name}, which this {library} does not have.")
    kwargs: dict[str, Any] = {"variant": variant_of(files), dtype_argument(library): dtype}
    try:
        module, info = cls.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, use_safetensors=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} does not fit its configuration: {error}") from error
    missing, unused = set(info["missing_keys"]), set(info["unexpected_keys"])
    if missing and {plain(key) for key in missing} == {plain(key) for key in unused}:
        missing, unused = set(), fill(module, files)
    check_keys(
        folder, missing=missing, unused=unused,
        wrong=[str(key) for key in info["mismatched_keys"]],
    )  # fmt: skip
    check_values(module, files, folder)
    return module


def dtype_argument(library: str) -> str:
    """Return what the installed library calls its dtype; the other name only warns, or worse."""
    module = require(library, purpose=PURPOSE, extra="models")
    version = tuple(int(part) for part in re.findall(r"\d+", module.__version__)[:2])
    renamed = {"diffusers": (0, 42), "transformers": (4, 56)}[library]
    return "dtype" if version >= renamed else "torch_dtype"
