"""LoRA state dicts brought into the dialect of diffusers, by diffusers' own converters."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files.weights import ModelError
from ..families import family_of

PEFT_PREFIX = "base_model.model."
MERGE = "Merge it into its base model with the tool that made it, and give the merged model."
"""What to do with a file that nothing here reads."""


def from_peft(raw: dict[str, Tensor], pipeline: Any, path: Path) -> dict[str, Tensor]:
    """Return PEFT's own dialect (``base_model.model.``) as diffusers reads it, alphas included.

    PEFT keeps the scale in adapter_config.json beside the weights, and it cannot be guessed.
    """
    if not any(key.startswith(PEFT_PREFIX) for key in raw):
        return raw
    config_path = path.with_name("adapter_config.json")
    if not config_path.is_file():
        raise ModelError(
            f"{path} was written by PEFT, which states the LoRA's scale in {config_path.name} "
            f"beside it; there is no such file. Put it there: {config_path}"
        )
    config = json.loads(config_path.read_text("utf-8"))
    if config.get("peft_type", "LORA") != "LORA":
        raise ModelError(f"{config_path} describes a {config['peft_type']}, not a LoRA. {MERGE}")
    if config.get("alpha_pattern") or config.get("use_rslora"):
        raise ModelError(f"{config_path}: alpha_pattern and use_rslora are not read.")
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    gain = config["lora_alpha"] / config["r"]
    state = {}
    for key, value in raw.items():
        name = key.removeprefix(PEFT_PREFIX).replace(".default.weight", ".weight")
        part = "text_encoder" if name.startswith(("text_model.", "encoder.layers.")) else denoiser
        # B takes the scale, so that the file says the same as one with alpha = rank.
        state[f"{part}.{name}"] = value * gain if ".lora_B." in name else value
    return state


def convert(
    pipeline: Any, raw: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Any] | None, Any]:
    """Return state dict, alphas and metadata in the diffusers dialect, by diffusers' converters."""
    options = family_of(pipeline).lora_options(pipeline)
    source: Any = raw
    if not any(key.startswith(("unet.", "transformer.", "text_encoder")) for key in raw):
        source = dict(raw)  # converters take keys out of it
    try:
        out = pipeline.lora_state_dict(source, return_lora_metadata=True, **options)
    except (ValueError, KeyError, RuntimeError, IndexError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{path} does not fit a {type(pipeline).__name__}: {str(error)[:300]}. Is it a LoRA "
            "for another architecture?"
        ) from error
    state, alphas, metadata = out if len(out) == 3 else (out[0], None, out[1])
    return state, alphas, metadata or _header_metadata(path)


def _header_metadata(path: Path) -> dict[str, Any] | None:
    """Return the ranks and scales that diffusers writes into the header of its files."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    return json.loads(text) if text else None
