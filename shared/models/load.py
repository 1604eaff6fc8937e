"""Models read strictly: what a library would only warn about is refused and named."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from ..dependencies import require
from ..quiet import quiet
from ..wording import name_some
from .adapter import PipelineDenoiser
from .families.flow import FAMILIES
from .lora.attach import load_lora
from .weights import (
    ModelError,
    check_finite,
    check_keys,
    check_memory,
    check_values,
    fill,
    plain,
    refuse_pickle,
    require_weights,
    sha256_of,
    variant_of,
)

__all__ = ["ModelError", "load_denoiser", "model_fingerprint", "resolve"]

COMPONENTS = (
    "unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3",
)  # fmt: skip
"""Parts with weights that a score or an image depends on."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that are not loaded: images are looked at as they come."""
PURPOSE = "Running a diffusion model"


def load_denoiser(
    model: str | Path,
    *,
    lora: Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    resolution: int | None = None,
    config: Path | None = None,
) -> PipelineDenoiser:
    """Load a model so that nothing of it is random, missing or ignored.

    Args:
        model: Diffusers folder, single-file .safetensors checkpoint, or hub id (``owner/name``).
        lora: LoRA file to put on it.
        device: Of torch; None for CUDA where there is one.
        dtype: None for float16 on CUDA, float32 elsewhere.
        revision: Of a hub id.
        resolution: Side of the images in pixels; None for what the model was made for.
        config: Diffusers folder that a single-file checkpoint takes its configuration and
            tokenizers from.

    Raises:
        ModelError: When the model or the LoRA cannot be used as it is.
    """
    for module in ("diffusers", "transformers"):
        require(module, purpose=PURPOSE, extra="models")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
    path = resolve(model, revision)
    if path.is_file():
        from .single_file import load_single_file

        pipeline = load_single_file(path, device=device, dtype=dtype, config=config)
    else:
        pipeline = _load_folder(path, device=device, dtype=dtype)
    parts = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    for name, part in parts.items():
        if part is not None:
            check_finite(part.state_dict(), f"{name} of {path}")
            part.eval().requires_grad_(False)  # gradients are asked for embeddings, never weights
    if lora is not None:
        load_lora(pipeline, Path(lora))
    return PipelineDenoiser(pipeline.to(device), resolution=resolution)


def model_fingerprint(
    model: str | Path, lora: Path | None = None, revision: str | None = None
) -> str:
    """Return the sha256 over the names and contents of the weight files, the LoRA's included."""
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
    if len(parts) == 1:
        return parts[0]
    import hashlib

    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """Return the file or folder of a model; only a hub id (``owner/name``) uses the network.

    Raises:
        ModelError: When there is no such file, and `model` is not a hub id either.
    """
    path = Path(model).expanduser()
    if path.is_file():
        refuse_pickle(path)
        return path
    if path.is_dir():
        return path
    text = str(model)
    is_id = isinstance(model, str) and re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", text)
    is_path = path.suffix in (".safetensors", ".ckpt", ".pt", ".bin") or path.parent.is_dir()
    if not is_id or (is_path and str(path.parent) != "."):
        raise ModelError(
            f"There is no such file or folder: {text}. Give a diffusers folder, a .safetensors "
            "checkpoint, or a hub id of the form owner/name."
        )
    return _download(text, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    """Return the cached copy of a hub repository, without pickles and without code."""
    from diffusers import DiffusionPipeline

    try:
        with quiet():
            return Path(DiffusionPipeline.download(hub_id, revision=revision, use_safetensors=True))
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        raise ModelError(
            f"There is no folder {hub_id} here, and as a hub id it could not be fetched: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def read_index(folder: Path) -> dict[str, Any]:
    """Return model_index.json, or say what the folder is instead."""
    path = folder / "model_index.json"
    if not path.is_file():
        files = sorted(p.name for p in folder.iterdir())
        checkpoints = [name for name in files if name.endswith(".safetensors")]
        hint = f" Did you mean {folder / checkpoints[0]}?" if checkpoints else ""
        raise ModelError(
            f"{folder} is not a diffusers model: model_index.json is missing; found "
            f"{name_some(files) or 'nothing'}.{hint}"
        )
    try:
        index = json.loads(path.read_text("utf-8"))
        name = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error!r}.") from error
    if name not in FAMILIES:
        raise ModelError(f"{path} describes a {name}; supported are {', '.join(FAMILIES)}.")
    return index


def read_components(folder: Path) -> dict[str, tuple[str, str]]:
    """Return library and class of the parts with weights."""
    index = read_index(folder)
    parts = {name: tuple(index[name]) for name in COMPONENTS if index.get(name)}
    return {name: part for name, part in parts.items() if part[0] is not None}


def _load_folder(folder: Path, *, device: str, dtype: torch.dtype) -> Any:
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
        absent = {name: None for name in UNUSED if name in index}
        cls = getattr(diffusers, index["_class_name"])
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
    kwargs = {"output_loading_info": True, "local_files_only": True, "use_safetensors": True}
    kwargs |= {"variant": variant_of(files), dtype_argument(library): dtype}
    try:
        module, info = cls.from_pretrained(folder, **kwargs)
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
