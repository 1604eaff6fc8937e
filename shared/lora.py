"""LoRA files on a diffusers pipeline: read strictly, switched off and on again."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dependencies import require
from .quiet import quiet
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
ADAPTER = "unmemorize"

Pairs = dict[tuple[str, str], dict[str, Tensor]]
"""By component and module: "A" [rank in ...], "B" [out rank ...]."""


def load_lora(pipeline: Any, path: Path) -> None:
    """Put a LoRA file on a pipeline, all of it, or raise and leave the pipeline as it was.

    The dialects (kohya, PEFT, diffusers) are read by diffusers' own converters, which skip what they
    do not know; here every key must arrive in the layer it names, with the scale the file states.

    Raises:
        ModelError: When the file is not a whole LoRA for this architecture; names the keys.
    """
    require("peft", purpose="Loading a LoRA", extra="models")
    read_header(path)
    from safetensors.torch import load_file

    raw = load_file(path)
    check_pairs(raw, path)
    check_finite(raw, str(path))
    raw = _from_peft(raw, pipeline, path)
    with quiet():
        state, alphas, metadata = _convert(pipeline, raw, path)
        pairs = _pairs(state, path)
        _check_fits(pipeline, pairs, path)
        _attach(pipeline, alphas, metadata, pairs, path)


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


def _modules(pipeline: Any, component: str) -> dict[str, torch.nn.Module]:
    """Return the modules of a component, without the prefix transformers 5 dropped."""
    part = getattr(pipeline, component, None)
    if not isinstance(part, torch.nn.Module):
        return {}
    return {name.removeprefix("text_model."): module for name, module in part.named_modules()}


def _check_fits(pipeline: Any, pairs: Pairs, path: Path) -> None:
    """Raise ModelError unless every module is there and has the factors' sizes."""
    modules = {component: _modules(pipeline, component) for component in COMPONENTS}
    absent, wrong = [], []
    for (component, name), pair in pairs.items():
        module = modules[component].get(name)
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        if weight is None:
            absent.append(f"{component}.{name}")
        elif (pair["B"].shape[0], *pair["A"].shape[1:]) != tuple(weight.shape) or (
            pair["A"].shape[0] != pair["B"].shape[1]
        ):
            wrong.append(
                f"{component}.{name} ({pair['B'].shape[0]} x {pair['A'].shape[1]} in the file, "
                f"{weight.shape[0]} x {weight.shape[1]} in the model)"
            )
    if absent or wrong:
        told = [f"{len(absent)} modules are not in it: {name_some(absent)}"] if absent else []
        told += [f"{len(wrong)} have another size: {name_some(wrong, 3)}"] if wrong else []
        raise ModelError(
            f"{path} is a LoRA for another architecture than this {type(pipeline).__name__}: "
            f"{'; '.join(told)}. Give the base model it was trained on."
        )


def _attach(pipeline: Any, alphas: Any, metadata: Any, pairs: Pairs, path: Path) -> None:
    """Load the factors and see that each layer holds them, and the scale of the file."""
    taken = {name for layer in _layers(pipeline) for name in layer.lora_A}
    adapter = next(f"{ADAPTER}_{i}" for i in range(999) if f"{ADAPTER}_{i}" not in taken)
    scales = {_module_of(key.removesuffix(".alpha")): v for key, v in (alphas or {}).items()}
    try:
        _load_parts(pipeline, pairs, metadata if not alphas else None, adapter)
        lost = []
        for (component, name), pair in pairs.items():
            layer = _modules(pipeline, component).get(name)
            if not _holds(layer, adapter, pair):
                lost.append(f"{component}.{name}")
            elif alphas or not metadata:  # diffusers loses alphas of text encoders on the way
                rank = len(pair["A"])
                alpha = float(scales.get((f"{component}.{name}", "A"), rank))
                layer.lora_alpha[adapter], layer.scaling[adapter] = alpha, alpha / rank
        if lost:
            raise ModelError(f"{path}: {len(lost)} modules were not filled: {name_some(lost)}.")
    except Exception as error:
        if any(adapter in getattr(layer, "lora_A", {}) for layer in _layers(pipeline)):
            pipeline.delete_adapters(adapter)
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} could not be loaded: {error}") from error
    for layer in _layers(pipeline):
        for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
            factor.requires_grad_(False)


def _holds(layer: Any, adapter: str, pair: dict[str, Tensor]) -> bool:
    """Return whether a layer carries exactly these factors."""
    if layer is None or adapter not in getattr(layer, "lora_A", {}):
        return False
    own = {"A": layer.lora_A[adapter].weight, "B": layer.lora_B[adapter].weight}
    return all(torch.equal(own[f].cpu(), pair[f].to(own[f].dtype)) for f in own)


def _load_parts(pipeline: Any, pairs: Pairs, metadata: Any, adapter: str) -> None:
    """Hand each component its factors under the names PEFT uses."""
    for part in sorted({component for component, _ in pairs}):
        module = getattr(pipeline, part)
        inner = "text_model." if hasattr(module, "text_model") else ""
        state = {
            f"{part}.{inner}{name}.lora_{factor}.weight": value
            for (component, name), pair in pairs.items()
            if component == part
            for factor, value in pair.items()
        }
        common = {"adapter_name": adapter, "_pipeline": pipeline, "metadata": metadata}
        if part in ("unet", "transformer"):
            module.load_lora_adapter(state, prefix=part, **common)
        else:
            pipeline.load_lora_into_text_encoder(
                state, network_alphas=None, text_encoder=module, prefix=part, **common
            )


def _layers(pipeline: Any) -> list[Any]:
    """Return the PEFT layers of all components."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # diffusers cannot have loaded a LoRA without it
        return []
    components = (getattr(pipeline, name, None) for name in COMPONENTS)
    return [
        module
        for component in components
        if isinstance(component, torch.nn.Module)
        for module in component.modules()
        if isinstance(module, BaseTunerLayer)
    ]


def has_lora(pipeline: Any) -> bool:
    """Return whether the pipeline carries a LoRA, active or not."""
    return bool(_layers(pipeline))


@contextmanager
def lora_disabled(pipeline: Any) -> Iterator[None]:
    """Switch every LoRA of the pipeline off for a block; afterwards all is as before.

    Raises:
        ValueError: When a LoRA is fused into the weights and cannot be switched off.
    """
    layers = _layers(pipeline)
    if any(layer.merged for layer in layers):
        raise ValueError("A LoRA is fused into the weights. Type: pipeline.unfuse_lora()")
    active = [layer for layer in layers if not layer.disable_adapters]
    trained = [(p, p.requires_grad) for layer in active for p in layer.parameters()]
    try:
        for layer in active:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in active:
            layer.enable_adapters(True)
        for parameter, flag in trained:  # PEFT switches gradients along with adapters
            parameter.requires_grad_(flag)
