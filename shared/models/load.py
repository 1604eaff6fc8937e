"""A model by its folder, file or hub id, so that nothing of it is random, missing or ignored."""

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..dependencies import require
from ..files.weights import ModelError, check_finite, refuse_pickle, sha256_of
from .adapter import PipelineDenoiser
from .checks import require_weights
from .folder import COMPONENTS, PURPOSE, load_folder, read_components
from .hub import download as _download
from .lora.attach import load_lora
from .quiet import quiet
from .single_file import load_single_file

FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".bin")
"""Endings of what is meant as a file."""


def load_denoiser(
    model: Any,
    *,
    lora: Path | None = None,
    strength: float = 1.0,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    resolution: int | None = None,
    config: Path | None = None,
) -> PipelineDenoiser:
    """Load a model so that nothing of it is random, missing or ignored, or take a pipeline.

    Args:
        model: Diffusers folder, single-file .safetensors checkpoint, or hub id (``owner/name``);
            or a diffusers text-to-image pipeline, which stays as it is and to which none of the
            arguments but `resolution` applies.
        lora: LoRA file to put on it.
        strength: Of the LoRA; 1 is what was trained.
        device: Of torch; None for CUDA where there is one.
        dtype: None for float16 on CUDA, float32 elsewhere.
        revision: Of a hub id.
        resolution: Side of the images in pixels; None for what the model was made for.
        config: Diffusers folder that a single-file checkpoint takes its configuration and
            tokenizers from.

    Raises:
        ModelError: When the model or the LoRA cannot be used as it is.
        ValueError: The pipeline is of no supported family, or an argument does not apply to it.
    """
    if not isinstance(model, str | Path):
        of_files = {"lora": lora, "device": device, "dtype": dtype, "revision": revision,
                    "config": config, "strength": None if strength == 1 else strength}  # fmt: skip
        if given := [name for name, value in of_files.items() if value is not None]:
            raise ValueError(f"A pipeline is taken as it is: leave out {', '.join(given)}.")
        return PipelineDenoiser(model, resolution=resolution)
    for module in ("diffusers", "transformers"):
        require(module, purpose=PURPOSE, extra="models")
    device = usable_device(device)
    dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
    path = resolve(model, revision)
    if path.is_file():
        pipeline = load_single_file(path, device=device, dtype=dtype, config=config)
    else:
        pipeline = load_folder(path, device=device, dtype=dtype)
    parts = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    for name, part in parts.items():
        if part is not None:
            check_finite(part.state_dict(), f"{name} of {path}")
            part.eval().requires_grad_(False)  # methods take gradients of embeddings alone
    if lora is not None:
        with quiet():
            load_lora(pipeline, Path(lora), strength)
    weights = partial(model_fingerprint, model, lora, revision, strength)
    return PipelineDenoiser(pipeline.to(device), resolution=resolution, weights=weights)


def usable_device(device: str | None) -> str:
    """Return a device by its name in torch; None is CUDA where there is one, else the CPU.

    Raises:
        ValueError: There is no such device here.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch raises either, by how it was built
        raise ValueError(
            f"The device {device} cannot be used: {str(error).splitlines()[0]}. Leave the device "
            "out for the best that is here, or name cpu."
        ) from error
    return device


def model_fingerprint(
    model: str | Path, lora: Path | None = None, revision: str | None = None, strength: float = 1.0
) -> str:
    """Return the sha256 over the names and contents of the weight files, the LoRA's included.

    A LoRA at another strength than 1 makes another model.
    """
    path = resolve(model, revision)
    if path.is_file():
        files, root = [path], path.parent
    else:
        root = path
        files = [file for name in read_components(path) for file in require_weights(path / name)]
    parts = [sha256_of(files, root)]
    if lora is not None:
        refuse_pickle(Path(lora))
        parts.append(sha256_of([Path(lora)], Path(lora).parent))
        parts += [f"strength {strength!r}"] if strength != 1 else []
    if len(parts) == 1:
        return parts[0]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """Return the file or folder of a model; only a hub id (``owner/name``) uses the network.

    Raises:
        ModelError: When there is no such file, and `model` is not a hub id either.
    """
    path = Path(model).expanduser()
    if path.is_file():
        refuse_pickle(path)
        if path.suffix.lower() == ".gguf":
            raise ModelError(
                f"{path} is a GGUF file: quantized weights of the network alone, which are not "
                "read. Give the diffusers folder or the whole checkpoint it was made from."
            )
        return path
    if path.is_dir():
        return path
    text = str(model)
    is_id = isinstance(model, str) and re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", text)
    is_path = (
        path.suffix in (".safetensors", ".gguf", ".ckpt", ".pt", ".bin") or path.parent.is_dir()
    )
    if not is_id or (is_path and str(path.parent) != "."):
        raise ModelError(
            f"There is no such file or folder: {text}. Give a diffusers folder, a .safetensors "
            "checkpoint, or a hub id of the form owner/name."
        )
    return _download(text, revision)
