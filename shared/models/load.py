"""A model by its folder, file or hub id, so that nothing of it is random, missing or ignored."""

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..dependencies import require
from ..files.weights import ModelError, check_finite, read_header, refuse_pickle, sha256_of
from ..wording import tells_of_memory
from .adapter import PipelineDenoiser
from .calls.quiet import quiet
from .checks import require_weights
from .families import FAMILIES
from .families.family import Family
from .folder import COMPONENTS, PURPOSE, load_folder, read_components, read_index
from .hub import download
from .lora.attach import load_lora
from .offload import OFFLOADS, enable_offload
from .quantization import RoundedWeights, check_quantization
from .single_file import load_single_file, pipeline_of

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
    frames: int | None = None,
    config: Path | None = None,
    offload: str | None = None,
    quantize: str | None = None,
) -> PipelineDenoiser:
    """Load a model so that nothing of it is random, missing or ignored, or take a pipeline.

    Args:
        model: Diffusers folder, single-file .safetensors checkpoint, or hub id (``owner/name``);
            or a diffusers text-to-image pipeline, which stays as it is and to which none of the
            arguments but `resolution` and `frames` apply.
        lora: LoRA file to put on it.
        strength: Of the LoRA; 1 is what was trained.
        device: Of torch; None for CUDA where there is one.
        dtype: None for float32, on CUDA for the half precision that the model's family computes
            in without overflow.
        revision: Of a hub id.
        resolution: Side of the images in pixels; None for what the model was made for.
        frames: Of a clip, None for as many as a video pipeline makes by itself.
        config: Diffusers folder that a single-file checkpoint takes its configuration and
            tokenizers from.
        offload: "model", "sequential" or "group": weights rest on the CPU and are brought to the
            device while they compute. Changes no score.
        quantize: "nf4", "int8" or "float8": of how many bits the network's weights are, and those
            of large text encoders. Makes another model, with scores of its own.

    Raises:
        ModelError: When the model or the LoRA cannot be used as it is.
        ValueError: The pipeline is of no supported family, or an argument does not apply to it.
    """
    if not isinstance(model, str | Path):
        of_files = {
            "lora": lora, "device": device, "dtype": dtype, "revision": revision,
            "config": config, "offload": offload, "quantize": quantize,
            "strength": None if strength == 1 else strength,
        }  # fmt: skip
        if given := [name for name, value in of_files.items() if value is not None]:
            raise ValueError(f"A pipeline is taken as it is: leave out {', '.join(given)}.")
        return PipelineDenoiser(model, resolution=resolution, frames=frames)
    for module in ("diffusers", "transformers"):
        require(module, purpose=PURPOSE, extra="models")
    device = usable_device(device)
    check_offload(offload, device)
    check_quantization(quantize, device=device, offload=offload, lora=lora is not None)
    path = resolve(model, revision)
    if config is not None and not path.is_file():
        raise ValueError(
            f"--model-config describes a checkpoint in one file, and {path} is a folder, which "
            "describes itself. Leave --model-config out."
        )
    dtype = dtype or default_dtype(path, device, config)
    if path.is_file() and quantize is not None:
        raise ModelError(
            f"--quantize reads diffusers folders, and {path} is a checkpoint in one file. Give "
            "the folder or hub id it was made from, or leave --quantize out."
        )
    try:
        if path.is_file():
            pipeline = load_single_file(
                path, device=device, dtype=dtype, config=config, offload=offload
            )
        else:
            pipeline = load_folder(
                path, device=device, dtype=dtype, offload=offload, quantize=quantize
            )
    except (MemoryError, RuntimeError) as error:
        if not tells_of_memory(error):
            raise
        raise ModelError(
            f"{path} does not fit into memory while it is loaded ({str(error)[:200]}). Close other "
            "programs, or load it smaller: --dtype float16, --offload model, --quantize int8."
        ) from error
    parts = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    for name, part in parts.items():
        if part is not None:
            check_finite(RoundedWeights(part), f"{name} of {path}")
            part.eval().requires_grad_(False)  # methods take gradients of embeddings alone
    if lora is not None:
        with quiet():
            load_lora(pipeline, Path(lora), strength)
    weights = partial(model_fingerprint, model, lora, revision, strength, quantize)
    if offload is None:
        pipeline.to(device)
    else:
        enable_offload(pipeline, offload, device)
    return PipelineDenoiser(pipeline, resolution=resolution, frames=frames, weights=weights)


def default_dtype(path: Path, device: str, config: Path | None = None) -> torch.dtype:
    """Return what a model computes in where nothing else is said.

    Args:
        path: Folder or file of the model; not looked at where the device computes in float32.
        device: By its name in torch.
        config: Diffusers folder that describes a file.

    Raises:
        ModelError: The folder or file is no model that can be used.
    """
    if not device.startswith("cuda"):
        return torch.float32
    return _family_at(path, config).half_precision


def makes_videos(path: Path, config: Path | None = None) -> bool:
    """Return whether a model makes videos; arguments and errors of `default_dtype`."""
    return _family_at(path, config).video


def _family_at(path: Path, config: Path | None) -> type[Family]:
    """Return the family of a model whose weights are not loaded."""
    name = (
        pipeline_of(path, read_header(path), config)[0] if path.is_file()
        else read_index(path)["_class_name"]
    )  # fmt: skip
    return FAMILIES.get(name, Family)


def check_offload(offload: str | None, device: str) -> None:
    """Make sure that there is something to bring weights to.

    Raises:
        ValueError: There is no such way, or the device is where weights rest anyway.
    """
    if offload is None:
        return
    if offload not in OFFLOADS:
        raise ValueError(f"`offload` must be one of {', '.join(OFFLOADS)}, got {offload!r}.")
    if torch.device(device).type == "cpu":
        raise ValueError(
            f"--offload brings weights from the CPU to a GPU, and the device is {device}. Leave it "
            "out, or name a GPU: --device cuda."
        )


def usable_device(device: str | None) -> str:
    """Return a device by its name in torch; None is CUDA where there is one, else the CPU.

    Raises:
        ValueError: There is no such device here.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # on "meta" tensors have no values
    except (AssertionError, RuntimeError) as error:  # torch raises either, by how it was built
        raise ValueError(
            f"The device {device} cannot be used: {str(error).splitlines()[0]}. Leave the device "
            "out for the best that is here, or name cpu."
        ) from error
    return device


def model_fingerprint(
    model: str | Path,
    lora: Path | None = None,
    revision: str | None = None,
    strength: float = 1.0,
    quantize: str | None = None,
) -> str:
    """Return the sha256 over the names and contents of the weight files, the LoRA's included.

    A LoRA at another strength than 1 makes another model, and so do weights of fewer bits.
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
    parts += [] if quantize is None else [f"quantized {quantize}"]
    if len(parts) == 1:
        return parts[0]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """Return the file or folder of a model; only a hub id (``owner/name``) uses the network.

    Raises:
        ModelError: When there is no such file, and `model` is not a hub id either.
        ValueError: A revision of what lies on this machine.
    """
    path = Path(model).expanduser()
    if revision is not None and path.exists():
        raise ValueError(
            f"--revision is that of a hub id, and {path} lies on this machine. Leave --revision "
            "out."
        )
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
    is_path = path.suffix in FILES or path.parent.is_dir()
    if not is_id or (is_path and str(path.parent) != "."):
        raise ModelError(
            f"There is no such file or folder: {text}. Give a diffusers folder, a .safetensors "
            "checkpoint, or a hub id of the form owner/name."
        )
    return download(text, revision)
