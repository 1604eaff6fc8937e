"""LoRA files in the dialects of kohya, PEFT and diffusers, brought to one form."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .weights import ModelError, check_finite, name_some, read_header

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts of a pipeline that can carry a LoRA."""
FACTORS = (
    (".lora_down.weight", ".lora_up.weight"),  # kohya
    (".lora_A.weight", ".lora_B.weight"),  # PEFT, and diffusers since 0.22
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),  # diffusers, text encoder
    ("_lora.down.weight", "_lora.up.weight"),  # diffusers, attention processors
    (".lora.down.weight", ".lora.up.weight"),
)
"""What ends the keys of the two factors, per dialect; only this file knows names."""
UNET_LAYERS = {"to_out": "to_out.0"}
TEXT_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
OTHER_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "magnitude_vector": "DoRA"}
PEFT_PREFIX = "base_model.model."
Pairs = dict[tuple[str, str], dict[str, Tensor]]
"""By component and module: "A" [rank in ...], "B" [out rank ...]."""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What a file says, by component and module of the pipeline it is for."""

    pairs: Pairs
    """Both factors of every module."""
    scales: dict[str, float]
    """alpha by ``component.module``; empty when the file states none."""
    metadata: dict[str, Any] | None
    """Ranks and scales as diffusers writes them into the header."""


def read_lora(pipeline: Any, path: Path) -> LoraFile:
    """Return a LoRA file as this pipeline names its modules.

    The dialects are told apart and renamed by diffusers' own converters.

    Raises:
        ModelError: When it is no LoRA, not whole, or not convertible for this pipeline.
    """
    read_header(path)
    from safetensors.torch import load_file

    raw = load_file(path)
    check_pairs(raw, path)
    check_finite(raw, str(path))
    state, alphas, metadata = _convert(pipeline, _from_peft(raw, pipeline, path), path)
    pairs = _pairs(state, path)
    scales = {_alpha_of(key): float(value) for key, value in (alphas or {}).items()}
    if strange := [name for name in scales if name not in {f"{c}.{n}" for c, n in pairs}]:
        raise ModelError(f"{path}: {len(strange)} scales that nothing reads: {name_some(strange)}.")
    return LoraFile(pairs=pairs, scales=scales, metadata=metadata)


def check_pairs(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ModelError unless every key belongs to a module that has both of its factors."""
    for mark, kind in OTHER_KINDS.items():
        if keys := [key for key in state if mark in key]:
            raise ModelError(
                f"{path} is a {kind}, not a LoRA ({len(keys)} keys such as {keys[0]}); merge it "
                "into its base model with the tool that made it, and give the merged model."
            )
    modules: dict[str, set[str]] = {}
    unknown = []
    for key in state:
        for ends in FACTORS:
            if hit := next((end for end in ends if key.endswith(end)), None):
                modules.setdefault(key.removesuffix(hit), set()).add("AB"[ends.index(hit)])
                break
        else:
            if key.endswith(".alpha"):
                modules.setdefault(key.removesuffix(".alpha"), set())
            else:
                unknown.append(key)
    if unknown or not modules:
        raise ModelError(
            f"{path} is not a LoRA that can be read: {len(unknown)} of {len(state)} keys are not "
            f"factors of a module: {name_some(unknown) or 'the file is empty'}. A whole model is "
            "given as MODEL, not as --lora."
        )
    if lone := [f"{name} ({'no factor' if not has else 'only ' + has.pop()})"
                for name, has in modules.items() if has != {"A", "B"}]:  # fmt: skip
        raise ModelError(
            f"{path}: {len(lone)} modules lack a LoRA factor: {name_some(lone)}. Is the file cut?"
        )


def _from_peft(raw: dict[str, Tensor], pipeline: Any, path: Path) -> dict[str, Tensor]:
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
    if config.get("alpha_pattern") or config.get("use_rslora") or config.get("use_dora"):
        raise ModelError(f"{config_path}: alpha_pattern, use_rslora and use_dora are not read.")
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    gain = config["lora_alpha"] / config["r"]
    state = {}
    for key, value in raw.items():
        name = key.removeprefix(PEFT_PREFIX).replace(".default.weight", ".weight")
        part = "text_encoder" if name.startswith(("text_model.", "encoder.layers.")) else denoiser
        # B takes the scale, so that the file says the same as one with alpha = rank.
        state[f"{part}.{name}"] = value * gain if ".lora_B." in name else value
    return state


def _convert(
    pipeline: Any, raw: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Any] | None, Any]:
    """Return state dict, alphas and metadata in the diffusers dialect, by diffusers' converters."""
    kwargs: dict[str, Any] = {}
    if type(pipeline).__name__.startswith("StableDiffusionXL"):
        kwargs["unet_config"] = pipeline.unet.config
    flux = type(pipeline).__name__.startswith("Flux")
    kwargs |= {"return_alphas": True} if flux else {}
    source: Any = raw
    if not any(key.startswith(("unet.", "transformer.", "text_encoder")) for key in raw):
        source = dict(raw)  # converters take keys out of it
    try:
        out = pipeline.lora_state_dict(source, return_lora_metadata=True, **kwargs)
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


def _module_of(key: str) -> tuple[str, str] | None:
    """Return the module a converted key belongs to and which factor it is; None for neither."""
    for ends in FACTORS:
        for end, factor in zip(ends, "AB", strict=True):
            if key.endswith(end):
                name = key.removesuffix(end)
                if end.startswith("_lora"):  # attention processors: the layer's name is shortened
                    name = name.replace(".processor.", ".")
                    long = TEXT_LAYERS if name.startswith("text_encoder") else UNET_LAYERS
                    head, _, tail = name.rpartition(".")
                    name = f"{head}.{long.get(tail, tail)}"
                return name.replace(".text_model.", ".", 1), factor
    return None


def _alpha_of(key: str) -> str:
    """Return the module a converted scale belongs to."""
    key = key.removesuffix(".alpha")
    module = _module_of(key)
    return module[0] if module else key.replace(".text_model.", ".", 1)


def _pairs(state: Mapping[str, Tensor], path: Path) -> Pairs:
    """Return the factors by component and module name, refusing keys that no component reads."""
    pairs: Pairs = {}
    stray = []
    for key, value in state.items():
        module = _module_of(key)
        component, _, name = module[0].partition(".") if module else ("", "", "")
        if component not in COMPONENTS:
            stray.append(key)
            continue
        pairs.setdefault((component, name), {})[module[1]] = value
    lone = [f"{c}.{n}" for (c, n), pair in pairs.items() if len(pair) < 2]
    if stray or lone:
        raise ModelError(
            f"{path}: {len(stray) + len(lone)} keys that nothing reads: {name_some(stray + lone)}."
        )
    return pairs
