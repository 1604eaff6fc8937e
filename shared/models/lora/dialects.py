"""How LoRA files spell their keys, and their translation into the dialect of diffusers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files.weights import ModelError, read_metadata
from ...wording import counted, name_some
from ..families import family_of

FACTORS = (
    (".lora_down.weight", ".lora_up.weight"),  # kohya
    (".lora_A.weight", ".lora_B.weight"),  # PEFT, and diffusers since 0.22
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),  # diffusers, text encoder
    ("_lora.down.weight", "_lora.up.weight"),  # diffusers, attention processors
    (".lora.down.weight", ".lora.up.weight"),
)
"""Endings of the keys of the factors A and B, per dialect."""
MAGNITUDES = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight",
              ".lora_magnitude_vector.default.weight")  # fmt: skip
"""Endings of the key of a DoRA's magnitudes: LyCORIS, then PEFT and diffusers."""
ENDINGS = {
    **{end: factor for ends in FACTORS for end, factor in zip(ends, "AB", strict=True)},
    **dict.fromkeys(MAGNITUDES, "magnitude"),
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
}
PEFT_PREFIX = "base_model.model."
NO_LORA = {
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "magnitude_vector": "DoRA",
    "oft_blocks": "OFT", ".on_input": "(IA)3", ".diff": "full change", ".w_norm": "norm",
}  # fmt: skip
"""Parametrizations that are no pair of factors, by a mark in their keys."""
MERGE = "Merge it into its base model with the tool that made it, and give the merged model."
"""The remedy for a file that nothing here reads."""


def split_key(key: str) -> tuple[str, str] | None:
    """Return the module that a key belongs to and which of its tensors it names.

    The tensor is "A", "B", "alpha", "mid" (the core of LoCon's Tucker form), "magnitude" (DoRA),
    or a factor of LoHa (``hada_...``) or LoKr (``lokr_...``). None for all other keys.
    """
    for end, tensor in ENDINGS.items():
        if key.endswith(end):
            return key.removesuffix(end), tensor
    module, _, factor = key.rpartition(".")
    return (module, factor) if factor.startswith(("hada_", "lokr_")) else None


def check_pairs(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ModelError unless every key belongs to a module that has both factors, A and B."""
    for mark, method in NO_LORA.items():
        if keys := [key for key in state if mark in key]:
            raise ModelError(
                f"{path} is a {method}, not a LoRA ({counted(len(keys), 'key', 'keys')} such as "
                f"{keys[0]}). {MERGE}"
            )
    modules: dict[str, set[str]] = {}
    unknown = []
    for key in state:
        module, tensor = split_key(key) or ("", "")
        if tensor in ("A", "B", "alpha"):
            modules.setdefault(module, set()).add(tensor)
        else:
            unknown.append(key)
    if unknown or not modules:
        faults = counted(len(unknown), "key is not a factor", "keys are not factors")
        raise ModelError(
            f"{path} is not a LoRA that can be read: {faults} of a module (of {len(state)}): "
            f"{name_some(unknown) or 'the file is empty'}. A whole model is given as MODEL, not as "
            "--lora."
        )
    factors = {module: tensors - {"alpha"} for module, tensors in modules.items()}
    if lone := [f"{module} ({'only ' + has.pop() if has else 'no factor'})"
                for module, has in factors.items() if len(has) < 2]:  # fmt: skip
        raise ModelError(
            f"{path}: {counted(len(lone), 'module lacks', 'modules lack')} a LoRA factor: "
            f"{name_some(lone)}. Is the file cut?"
        )


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
    gain = config["lora_alpha"] / config["r"]
    state = {}
    for key, value in raw.items():
        name = key.removeprefix(PEFT_PREFIX).replace(".default.weight", ".weight")
        is_text = name.startswith(("text_model.", "encoder.layers."))
        part = "text_encoder" if is_text else family_of(pipeline).network_name
        # B takes the scale, so that the file says the same as one with alpha = rank.
        state[f"{part}.{name}"] = value * gain if ".lora_B." in name else value
    return state


def convert(
    pipeline: Any, raw: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return state dict, alphas and metadata in the dialect of diffusers, by its own converters."""
    source: Any = raw
    if not any(key.startswith(("unet.", "transformer.", "text_encoder")) for key in raw):
        source = dict(raw)  # converters take keys out of it
    try:
        out = pipeline.lora_state_dict(
            source, return_lora_metadata=True, **family_of(pipeline).lora_options(pipeline)
        )
    except (ValueError, KeyError, RuntimeError, IndexError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{path} does not fit a {type(pipeline).__name__}: {str(error)[:300]}. Is it a LoRA "
            "for another architecture?"
        ) from error
    state, alphas, metadata = out if len(out) == 3 else (out[0], None, out[1])
    if not metadata:  # what diffusers writes into the header: ranks and scales
        metadata = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    return state, alphas or {}, metadata
