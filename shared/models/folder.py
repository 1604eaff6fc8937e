"""Diffusers folders read strictly: what a library would only warn about is refused and named."""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..dependencies import require
from ..files.weights import READER, ModelError, read_header, refuse_quantized
from ..wording import name_some, tells_of_memory
from .calls.quiet import quiet
from .checks import (
    bytes_needed,
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
from .families.family import NETWORKS
from .families.undeclared import refusal
from .quantization import LARGE, QUANTIZATIONS, quantization_config

COMPONENTS = (
    "unet", "transformer", "transformer_2", "vae",
    "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4",
)  # fmt: skip
"""Parts with weights that a score or an image depends on."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "pe", "pe_tokenizer")
"""Parts that are not loaded: images are looked at as they come, prompts are read as they are."""
LIBRARIES = ("diffusers", "transformers")
"""Whose classes a folder may ask for."""
LEFT_OUT = ("text_encoder_3", "tokenizer_3")
"""T5, which Stable Diffusion 3 does without; diffusers saves nothing about it then, and asks."""
LONGEST = 100
"""Characters of a name in a message."""
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
    index = READER.check(READER.parse_file(path), dict[str, Any], str(path))
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ModelError(f"{path} names no pipeline: expected its class under _class_name.")
    if name not in FAMILIES and (reason := _refusal(name)):
        raise ModelError(f"{path} describes a {name[:LONGEST]}: {reason}")
    _refuse_foreign(index, path)
    return index


def _refusal(name: str) -> str:
    """Return why pipelines of a class that no family declares cannot be tried, "" if they can."""
    import diffusers

    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        return f"this diffusers has no such pipeline; supported are {', '.join(FAMILIES)}."
    return refusal(cls)


def _refuse_foreign(index: Mapping[str, Any], path: Path) -> None:
    """Raise ModelError where any part that is loaded asks for another library's class.

    Some releases of diffusers import a module of that name out of the folder, whatever the part.
    """
    for name, part in index.items():
        single = not isinstance(part, list) and name not in COMPONENTS
        if name.startswith("_") or name in UNUSED or single:
            continue  # a setting of the pipeline
        known = (*LIBRARIES, None)
        if part is None and name in COMPONENTS:
            continue
        if not name.isidentifier() or len(name) > LONGEST:  # its folder could lie anywhere
            raise ModelError(f"{path} names a part {name[:LONGEST]!r}, expected that of a folder.")
        pair = isinstance(part, list) and len(part) == 2
        if not pair or any(not isinstance(each, str | None) for each in part):
            raise ModelError(
                f"{path}: {name[:LONGEST]} is {str(part)[:LONGEST]!r}, expected a library and a "
                "class in it."
            )
        if part[0] not in known or not str(part[1]).isidentifier():
            asked = f"{part[0]}.{part[1]}"[:LONGEST]
            raise ModelError(
                f"{path} asks for {asked} as {name[:LONGEST]}: only classes of "
                f"{' and '.join(LIBRARIES)} are loaded, others could run any program."
            )


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


def load_folder(
    folder: Path,
    *,
    device: str,
    dtype: torch.dtype,
    offload: str | None = None,
    quantize: str | None = None,
) -> Any:
    """Return the pipeline of a diffusers folder, every part of it checked.

    Args:
        folder: With model_index.json.
        device: Where it will run; its memory is checked.
        dtype: What it will compute in.
        offload: How weights come to the device, see `offload.OFFLOADS`; None: they all lie there.
        quantize: See `quantization.QUANTIZATIONS`.
    """
    import diffusers

    index, components = read_index(folder), read_components(folder)
    files = {name: require_weights(folder / name) for name in components}
    sizes = {name: bytes_needed(part, dtype) for name, part in files.items()}
    check_memory(sum(sizes.values()), dtype, "cpu")  # through which all weights pass
    formats = {
        name: quantize if name in NETWORKS or sizes[name] >= LARGE * dtype.itemsize else None
        for name in components if name != "vae"
    }  # fmt: skip
    for name, form in formats.items():
        if form is not None:
            sizes[name] = sizes[name] * QUANTIZATIONS[form].bits // (8 * dtype.itemsize)
    if device != "cpu" and offload in (None, "model"):
        together = sum if offload is None else max
        check_memory(together(sizes.values()), dtype, device)
    with quiet():
        loaded = {
            name: _load_component(
                folder / name, *components[name], files[name], dtype,
                quantize=formats.get(name), device=device,
            )
            for name in components
        }  # fmt: skip
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
    folder: Path,
    library: str,
    name: str,
    files: list[Path],
    dtype: torch.dtype,
    *,
    quantize: str | None,
    device: str,
) -> torch.nn.Module:
    """Load one part and refuse it unless every parameter came from the file, and all of it."""
    _refuse_quantized(folder, files)
    cls = getattr(require(library, purpose=PURPOSE, extra="models"), name, None)
    if cls is None:
        raise ModelError(f"{folder} asks for {library}.{name}, which this {library} does not have.")
    kwargs: dict[str, Any] = {"variant": variant_of(files), dtype_argument(library): dtype}
    if quantize is not None:
        kwargs["quantization_config"] = quantization_config(quantize, library, dtype)
        if QUANTIZATIONS[quantize].needs_gpu:  # else the first GPU would be taken
            kwargs["device_map"] = {"": device}
    try:
        module, info = cls.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, use_safetensors=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if tells_of_memory(error):
            raise
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


def _refuse_quantized(folder: Path, files: Sequence[Path]) -> None:
    """Raise ModelError for a part whose weights are codes."""
    path = folder / "config.json"
    config = READER.parse_file(path) if path.is_file() else {}
    if isinstance(config, dict) and (how := config.get("quantization_config")):
        method = how.get("quant_method", "an unknown method") if isinstance(how, dict) else how
        raise ModelError(
            f"{folder} is quantized ({method}), and what was rounded cannot be compared with the "
            "file. Give the same model in fp32, bf16 or fp16."
        )
    for file in files:
        refuse_quantized(file, read_header(file))


def dtype_argument(library: str) -> str:
    """Return what the installed library calls its dtype; the other name only warns, or worse."""
    module = require(library, purpose=PURPOSE, extra="models")
    version = tuple(int(part) for part in re.findall(r"\d+", module.__version__)[:2])
    renamed = {"diffusers": (0, 42), "transformers": (4, 56)}[library]
    return "dtype" if version >= renamed else "torch_dtype"
