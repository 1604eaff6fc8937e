"""LoRA files in the dialects of kohya, PEFT, diffusers and LyCORIS, brought to one form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.weights import ModelError, check_finite, read_header
from ...wording import counted, name_some
from .dialects import MERGE, convert, from_peft
from .lycoris import Product, fold_tucker, take_magnitudes, take_products

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
OTHER_KINDS = {
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "magnitude_vector": "DoRA",
    "oft_blocks": "OFT", ".on_input": "(IA)3", ".diff": "full change", ".w_norm": "norm",
}  # fmt: skip
"""What is no pair of factors, by a mark in the keys; the first four `read_lora` takes before."""
Place = tuple[str, str]
"""Component of the pipeline and module in it."""
Pairs = dict[Place, dict[str, Tensor]]
"""The factors "A" [rank in ...] and "B" [out rank ...] of each module."""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What a file says, by component and module of the pipeline it is for."""

    pairs: Pairs
    """Both factors of every module."""
    scales: dict[str, float]
    """alpha by ``component.module``; empty when the file states none."""
    metadata: dict[str, Any] | None
    """Ranks and scales as diffusers writes them into the header."""
    products: dict[Place, Product] = field(default_factory=dict)
    """LoHa and LoKr modules."""
    magnitudes: dict[Place, Tensor] = field(default_factory=dict)
    """[out] of the modules in `pairs` that are a DoRA."""


def read_lora(pipeline: Any, path: Path) -> LoraFile:
    """Return a LoRA file as this pipeline names its modules.

    The dialects are told apart and renamed by diffusers' own converters.

    Raises:
        ModelError: When it is no LoRA, not whole, or not convertible for this pipeline.
    """
    read_header(path)
    from safetensors.torch import load_file

    raw = load_file(path)
    check_finite(raw, str(path))
    try:
        products, magnitudes = take_products(raw), take_magnitudes(raw)
        fold_tucker(raw)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be read: {error}. {MERGE}") from error
    if both := sorted(products.keys() & magnitudes.keys()):
        kind = products[both[0]].kind
        raise ModelError(f"{path} is a DoRA of a {kind}, which PEFT does not read. {MERGE}")
    pairs, scales, metadata = {}, {}, None
    if raw or not products:
        check_pairs(raw, path)
        state, alphas, metadata = convert(pipeline, from_peft(raw, pipeline, path), path)
        pairs = _pairs(state, path)
        scales = {_alpha_of(key): float(value) for key, value in (alphas or {}).items()}
        if strange := scales.keys() - {f"{component}.{name}" for component, name in pairs}:
            raise ModelError(
                f"{path}: {counted(len(strange), 'scale', 'scales')} that nothing reads: "
                f"{name_some(strange)}."
            )
    names = _names(pipeline, [*products, *magnitudes], path)
    decomposed = {names[stem] for stem in magnitudes}
    parts = {component for component, _ in decomposed}
    if plain := [f"{c}.{n}" for c, n in pairs if c in parts and (c, n) not in decomposed]:
        raise ModelError(
            f"{path} is a DoRA in some modules and not in {len(plain)}: {name_some(plain)}. {MERGE}"
        )
    return LoraFile(
        pairs=pairs,
        scales=scales,
        metadata=metadata,
        products={names[stem]: product for stem, product in products.items()},
        magnitudes={names[stem]: magnitude for stem, magnitude in magnitudes.items()},
    )


def _names(pipeline: Any, stems: Sequence[str], path: Path) -> dict[str, Place]:
    """Return component and module of what stands before the dot of LyCORIS' keys.

    diffusers' converters know LoRA alone, so each name is sent through them on a LoRA whose only
    number says which name it was.
    """
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    modules = dict(getattr(pipeline, denoiser).named_modules())
    flat = {f"lycoris_{name.replace('.', '_')}": (denoiser, name) for name in modules}
    names = {stem: flat[stem] for stem in stems if stem in flat}
    sent = [stem for stem in stems if stem not in flat]
    tagged = {}
    for index, stem in enumerate(sent):
        down, up = FACTORS[1 if "." in stem else 0]
        tagged |= {f"{stem}{down}": torch.full((1, 1), index), f"{stem}{up}": torch.ones(1, 1)}
    if tagged:
        state, *_ = convert(pipeline, from_peft(tagged, pipeline, path), path)
        for name, pair in _pairs(state, path).items():
            names[sent[int(pair["A"])]] = name
    if len(set(names.values())) != len(stems):
        raise ModelError(f"{path} changes several layers at once. {MERGE}")
    return names


def check_pairs(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ModelError unless every key belongs to a module that has both of its factors."""
    for mark, kind in OTHER_KINDS.items():
        if keys := [key for key in state if mark in key]:
            raise ModelError(
                f"{path} is a {kind}, not a LoRA ({counted(len(keys), 'key', 'keys')} such as "
                f"{keys[0]}). {MERGE}"
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
        keys = counted(len(unknown), "key is not a factor", "keys are not factors")
        raise ModelError(
            f"{path} is not a LoRA that can be read: {keys} of a module (of {len(state)}): "
            f"{name_some(unknown) or 'the file is empty'}. A whole model is given as MODEL, not as "
            "--lora."
        )
    if lone := [f"{name} ({'no factor' if not has else 'only ' + has.pop()})"
                for name, has in modules.items() if has != {"A", "B"}]:  # fmt: skip
        raise ModelError(
            f"{path}: {counted(len(lone), 'module lacks', 'modules lack')} a LoRA factor: "
            f"{name_some(lone)}. Is the file cut?"
        )


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
            f"{path}: {counted(len(stray) + len(lone), 'key', 'keys')} that nothing reads: "
            f"{name_some(stray + lone)}."
        )
    return pairs
