"""LoRA files in the dialects of kohya, PEFT, diffusers and LyCORIS, brought to one form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.weights import ModelError, read_tensors
from ...wording import counted, name_some
from ..families import family_of
from .dialects import FACTORS, MERGE, check_pairs, convert, from_peft, split_key
from .lycoris import Product, fold_tucker, take_magnitudes, take_products

CARRIERS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts of a pipeline that can carry a LoRA."""
UNET_LAYERS = {"to_out": "to_out.0"}
TEXT_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Names of layers that diffusers' attention processors shortened."""
Place = tuple[str, str]
"""Component of the pipeline and module in it, without the ``text_model.`` of transformers 4."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One module of a LoRA: the change alpha / rank * B A of a weight."""

    a: Tensor
    """[rank in ...]."""
    b: Tensor
    """[out rank ...]."""
    alpha: float | None
    """As the file says; None where it does not say."""
    magnitude: Tensor | None
    """[out] of a DoRA."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the change, rows first."""
        return (len(self.b), *self.a.shape[1:])

    @property
    def settings(self) -> tuple:
        """What a layer of PEFT is made for; modules that agree in it are made at once."""
        return self.rank, self.alpha, self.magnitude is not None


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """The modules of a file, by component and module of the pipeline it is for."""

    modules: dict[Place, Pair | Product]
    metadata: dict[str, Any]
    """PEFT's configuration by ``component.option``, as diffusers writes it into the header; empty
    where there is none, or the pairs say their scales."""

    def header_of(self, component: str) -> dict[str, Any]:
        """Return what `metadata` says of one component."""
        own = f"{component}."
        return {k.removeprefix(own): v for k, v in self.metadata.items() if k.startswith(own)}


def read_lora(pipeline: Any, path: Path) -> LoraFile:
    """Return a LoRA file as this pipeline names its modules.

    The dialects are recognised and renamed by diffusers' own converters.

    Raises:
        ModelError: When it is no LoRA, not whole, or not convertible for this pipeline.
    """
    raw = read_tensors(path)
    try:
        products, magnitudes = take_products(raw), take_magnitudes(raw)
        fold_tucker(raw)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be read: {error}. {MERGE}") from error
    if both := sorted(products.keys() & magnitudes.keys()):
        algorithm = products[both[0]].algorithm
        raise ModelError(f"{path} is a DoRA of a {algorithm}, which PEFT does not read. {MERGE}")
    factors: dict[Place, dict[str, Tensor]] = {}
    alphas: dict[Place, float] = {}
    metadata: dict[str, Any] = {}
    if raw or not products:
        check_pairs(raw, path)
        state, scales, metadata = convert(pipeline, from_peft(raw, pipeline, path), path)
        factors = _factors(state, path)
        alphas = {_place(key): float(value) for key, value in scales.items()}
        if strange := [".".join(place) for place in alphas.keys() - factors.keys()]:
            raise ModelError(
                f"{path}: {counted(len(strange), 'scale', 'scales')} that nothing reads: "
                f"{name_some(strange)}."
            )
    names = _names(pipeline, [*products, *magnitudes], path)
    decomposed = {names[stem]: magnitude for stem, magnitude in magnitudes.items()}
    parts = {component for component, _ in decomposed}
    if bare := [".".join(at) for at in factors if at[0] in parts and at not in decomposed]:
        raise ModelError(
            f"{path} is a DoRA in some modules and not in {len(bare)}: {name_some(bare)}. {MERGE}"
        )
    pairs = {
        place: Pair(
            a=pair["A"], b=pair["B"], alpha=alphas.get(place), magnitude=decomposed.get(place)
        )
        for place, pair in factors.items()
    }
    return LoraFile(
        modules=pairs | {names[stem]: product for stem, product in products.items()},
        metadata={} if alphas else metadata,
    )


def _names(pipeline: Any, stems: Sequence[str], path: Path) -> dict[str, Place]:
    """Return the component and module for what stands before the last dot of LyCORIS' keys.

    diffusers' converters know LoRA alone. So each name is sent through them as a LoRA of one
    number, its index, which says afterwards which name it was: with ["lora_te_..._q_proj"],
    "lora_te_..._q_proj.lora_down.weight" = [[0]] comes back as "text_encoder....q_proj.lora_A".
    """
    denoiser = family_of(pipeline).network_name
    modules = dict(getattr(pipeline, denoiser).named_modules())
    flat = {f"lycoris_{name.replace('.', '_')}": (denoiser, name) for name in modules}
    names = {stem: flat[stem] for stem in stems if stem in flat}
    sent = [stem for stem in stems if stem not in flat]
    tagged: dict[str, Tensor] = {}
    for index, stem in enumerate(sent):
        down, up = FACTORS[1 if "." in stem else 0]
        tagged |= {f"{stem}{down}": torch.full((1, 1), index), f"{stem}{up}": torch.ones(1, 1)}
    if tagged:
        state, *_ = convert(pipeline, from_peft(tagged, pipeline, path), path)
        for place, factors in _factors(state, path).items():
            names[sent[int(factors["A"])]] = place
    if len(set(names.values())) != len(stems):
        raise ModelError(f"{path} changes several layers at once. {MERGE}")
    return names


def _factors(state: Mapping[str, Tensor], path: Path) -> dict[Place, dict[str, Tensor]]:
    """Return the factors "A" and "B" by place, refusing keys that no component reads."""
    factors: dict[Place, dict[str, Tensor]] = {}
    stray = []
    for key, value in state.items():
        _, tensor = split_key(key) or ("", "")
        if tensor in ("A", "B") and _place(key)[0] in CARRIERS:
            factors.setdefault(_place(key), {})[tensor] = value
        else:
            stray.append(key)
    stray += [".".join(place) for place, pair in factors.items() if len(pair) < 2]
    if stray:
        raise ModelError(
            f"{path}: {counted(len(stray), 'key', 'keys')} that nothing reads: {name_some(stray)}."
        )
    return factors


def _place(key: str) -> Place:
    """Return component and module of a converted key, also of a scale's: "<factor's key>.alpha"."""
    module, _ = split_key(key.removesuffix(".alpha")) or (key.removesuffix(".alpha"), "")
    if key[len(module) :].startswith("_lora"):  # attention processors shorten the layer's name
        head, _, tail = module.replace(".processor.", ".").rpartition(".")
        long = TEXT_LAYERS if module.startswith("text_encoder") else UNET_LAYERS
        module = f"{head}.{long.get(tail, tail)}"
    component, _, name = module.replace(".text_model.", ".", 1).partition(".")
    return component, name
