"""Checkpoints in one file, read through diffusers without the network, nothing left out."""

import inspect
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.weights import ModelError, read_header, read_metadata, refuse_quantized
from ..wording import counted, name_some
from .calls.quiet import quiet
from .checks import bytes_needed, check_memory
from .families import FAMILIES
from .folder import dtype_argument, read_components, read_index

PIPELINES = {start: name for name, family in FAMILIES.items() for start in family.checkpoints}
"""By the start of what diffusers calls a checkpoint's architecture."""
GROUPS = {
    "unet": ("model.diffusion_model.",),
    "transformer": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": (
        "cond_stage_model.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.", "conditioner.embedders.0.model.",
                       "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}  # fmt: skip
"""How the keys of each part begin."""
PREDICTION = "modelspec.prediction_type"
"""Key of a header for what the network predicts: "epsilon" or "v"."""
BOOKKEEPING = re.compile(
    r"^(model_ema\.|model\.model_ema\.|denoiser\.sigmas$|v_pred$|ztsnr$)"
    r"|position_ids$|logit_scale$|^[a-z0-9_]*(betas|alphas|posterior|cumprod)[a-z0-9_]*$"
    # SD 2 is used one layer below the last, and without a pooled vector.
    r"|^cond_stage_model\.model\.(text_projection$|transformer\.resblocks\.23\.)"
)
"""Keys that no network reads: schedules, averaged copies, constants of the training code."""


def load_single_file(
    path: Path,
    *,
    device: str,
    dtype: torch.dtype,
    config: Path | None,
    offload: str | None = None,
) -> Any:
    """Return the pipeline of a checkpoint, or raise ModelError naming what is wrong with it.

    Args:
        path: A .safetensors file that holds network, autoencoder and text encoders.
        device: Where it will run; its memory is checked.
        dtype: What it will compute in.
        config: Diffusers folder for configuration and tokenizers; None for what the hub's cache
            holds. Nothing is downloaded.
        offload: Weights rest on the CPU, and less than all are on `device` at a time.
    """
    import diffusers

    header = read_header(path)
    refuse_quantized(path, header)
    _refuse_parts(path, header)
    for place in {"cpu", device} if offload is None else {"cpu"}:
        check_memory(bytes_needed([path], dtype), dtype, place)
    name, folder = pipeline_of(path, header, config)
    _refuse_gaps(path, header, folder)
    kwargs = {dtype_argument("diffusers"): dtype, "local_files_only": True}
    if name == "StableDiffusionPipeline":
        kwargs |= {"safety_checker": None, "feature_extractor": None}
    try:
        with quiet():
            pipeline = getattr(diffusers, name).from_single_file(
                str(path), config=str(folder), **kwargs
            )
    except Exception as error:  # the converters raise whatever a missing key makes them raise
        raise ModelError(
            f"{path} does not fit the configuration in {folder}: {type(error).__name__}: {error}. "
            "Is the checkpoint whole, and of the same architecture?"
        ) from error
    check_complete(pipeline, path, header)
    _follow_marks(pipeline, path, header)
    return pipeline


def _follow_marks(pipeline: Any, path: Path, header: dict) -> None:
    """Give the scheduler what the file says of its training; the weights alone do not tell.

    A key ``v_pred`` marks a network that predicts the velocity, ``ztsnr`` one that was trained up
    to pure noise (Lin et al., arXiv:2305.08891): the convention of NoobAI that ComfyUI reads. The
    header's ``modelspec.prediction_type`` says v as well; where no key tells and the configuration
    does not know of it, such models were trained up to pure noise.
    """
    from diffusers import DDIMScheduler

    scheduler = pipeline.scheduler
    said = read_metadata(path).get(PREDICTION, "").casefold().replace("-", "_")
    keyed, flow = "v_pred" in header, "prediction_type" not in scheduler.config
    if flow or not (keyed or "ztsnr" in header or said in ("v", "v_prediction", "v_pred")):
        return
    known = scheduler.config.prediction_type == "v_prediction"
    settings: dict[str, Any] = {"prediction_type": "v_prediction"}
    if "ztsnr" in header or not (keyed or known):
        settings["rescale_betas_zero_snr"] = True
    cls = type(scheduler)
    if any(name not in inspect.signature(cls).parameters for name in settings):
        cls = DDIMScheduler
    with quiet():
        pipeline.scheduler = cls.from_config(scheduler.config, **settings)


def _refuse_parts(path: Path, header: dict) -> None:
    """Raise ModelError for files that are no whole checkpoint."""
    if marks := [key for key in header if key.startswith("edm_")]:
        raise ModelError(
            f"{path} is an EDM model ({name_some(marks)}), whose noise levels are not read here. "
            "Give the model it was made from."
        )
    if any("lora" in key for key in header):
        raise ModelError(f"{path} is a LoRA: give it with --lora, and its base model as MODEL.")
    prefix = GROUPS["unet"][0]
    if not any(key.startswith(prefix) for key in header):
        raise ModelError(
            f"{path} is not a whole checkpoint: no key begins with {prefix!r}; found "
            f"{name_some(header, 3) or 'nothing'}. Give the diffusers folder it comes from."
        )


def pipeline_of(path: Path, header: dict, config: Path | None) -> tuple[str, Path]:
    """Return pipeline class and the folder its configuration is read from."""
    from diffusers.loaders.single_file_utils import (
        DIFFUSERS_DEFAULT_PIPELINE_PATHS,
        infer_diffusers_model_type,
    )

    if config is not None:
        return read_index(Path(config))["_class_name"], Path(config)
    shapes = {key: torch.empty(shape, device="meta") for key, (_, shape) in header.items()}
    architecture = infer_diffusers_model_type(shapes)  # reads names and shapes only
    name = next((cls for start, cls in PIPELINES.items() if architecture.startswith(start)), None)
    if name is None:
        raise ModelError(
            f"{path} is of the architecture {architecture}; supported are {', '.join(PIPELINES)}."
        )
    repository = DIFFUSERS_DEFAULT_PIPELINE_PATHS[architecture]["pretrained_model_name_or_path"]
    from huggingface_hub import snapshot_download

    try:
        return name, Path(snapshot_download(repository, local_files_only=True))
    except Exception as error:  # OSError and ValueError of several releases
        raise ModelError(
            f"{path} holds weights only; its configuration and tokenizers come from a diffusers "
            f"folder such as {repository}, which is not on this machine. Give one with "
            f'--model-config FOLDER, or type: hf download {repository} --include "*.json" "*.txt"'
        ) from error


def _refuse_gaps(path: Path, header: dict, folder: Path) -> None:
    """Raise ModelError naming parameters the file leaves unset, before anything is loaded.

    Runs diffusers' own converters on tensors without data, since they only fail without a name.
    """
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as CONVERTERS

    unset: list[str] = []
    for part, (_, name) in read_components(folder).items():
        convert = CONVERTERS.get(name, {}).get("checkpoint_mapping_fn")
        if convert is None:  # text encoders: counted after loading
            continue
        cls = getattr(diffusers, name)
        config = cls.load_config(folder, subfolder=part)
        with torch.device("meta"):
            expected = cls.from_config(config).state_dict()
            given = {key: torch.empty(shape) for key, (_, shape) in header.items()}
        try:
            converted = convert(config=dict(config), checkpoint=given)
        except KeyError as error:
            unset.append(f"{part}: {error.args[0]}")
            continue
        unset += [f"{part}.{key}" for key in expected if key not in converted]
    _refuse_unset(path, unset)


def _refuse_unset(path: Path, names: list[str]) -> None:
    if names:
        count = counted(len(names), "parameter", "parameters")
        raise ModelError(f"{path} leaves {count} unset: {name_some(names)}.")


def check_complete(pipeline: Any, path: Path, header: dict) -> None:
    """Raise ModelError when parameters stay unset or keys unused, which converters pass over.

    Every part of the pipeline must have as many values as the file has for it.
    """
    states = {
        name: part.state_dict()
        for name in GROUPS
        if (part := getattr(pipeline, name, None)) is not None
    }
    _refuse_unset(path, [f"{name}.{key}" for name, state in states.items()
                         for key, tensor in state.items() if tensor.is_meta])  # fmt: skip
    keys = {key for key in header if not BOOKKEEPING.search(key)}
    starts = tuple(start for name in states for start in GROUPS[name])
    if stray := [key for key in keys if not key.startswith(starts)]:
        count = counted(len(stray), "key", "keys")
        raise ModelError(f"{path} has {count} that nothing reads: {name_some(stray)}.")
    for name, state in states.items():
        own = [key for key in keys if key.startswith(GROUPS[name])]
        held = sum(tensor.numel() for tensor in state.values())
        given = sum(math.prod(header[key][1]) for key in own)
        if held != given:
            raise ModelError(
                f"{path} holds {given:,} values for {name}, which has {held:,}: "
                f"{name_some(_unmatched(path, own, [*state.values()])) or 'some'} "
                "were not read, or parameters were left unset."
            )


def _unmatched(path: Path, keys: Iterable[str], loaded: list[Tensor]) -> list[str]:
    """Return the keys whose values are in no loaded tensor, whatever its name became."""
    from safetensors import safe_open

    seen = {(t.numel(), float(t.double().sum())) for t in loaded}
    dtype = loaded[0].dtype
    with safe_open(path, "pt") as file:
        values = {key: file.get_tensor(key).to(dtype) for key in keys if "in_proj" not in key}
    return [k for k, v in values.items() if (v.numel(), float(v.double().sum())) not in seen]
