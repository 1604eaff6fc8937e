"""LoRA files of every dialect, brought to one form: the change of each layer of a pipeline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.weights import ModelError, read_tensors
from ...wording import counted, name_some
from .dialects import (
    FACTORS,
    PEFT_PREFIX,
    by_diffusers,
    check_pairs,
    split_key,
    take_embeddings,
)
from .lycoris import Product, fold_tucker, take_magnitudes, take_products
from .names import CARRIERS, LiveNames, Place
from .peft_config import MERGE, config_beside, configs_in_header

UNET_LAYERS = {"to_out": "to_out.0"}
TEXT_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Names of layers that diffusers' attention processors shortened."""
CLOSE = 1e-3
"""By what share the size of all changes may differ after diffusers' converters."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One module of a LoRA: the change alpha / rank * B A of a weight."""

    a: Tensor
    """[rank in ...]."""
    b: Tensor
    """[out rank ...]."""
    alpha: float | None
    """As the file says; None where it does not say, for the rank."""
    magnitude: Tensor | None = None
    """[out] of a DoRA."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)

    @property
    def scaling(self) -> float:
        """What the product is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the change, rows first."""
        return (len(self.b), *self.a.shape[1:])

    @property
    def settings(self) -> tuple:
        """What a layer of PEFT is made for; modules that agree in it are made at once."""
        return self.rank, self.alpha, self.magnitude is not None

    def size(self) -> float:
        """Return the Frobenius norm of alpha / rank * B A, of which the product is not needed."""
        a, b = self.a.double().flatten(1), self.b.double().flatten(1)
        # |B A|^2 = trace(A^T B^T B A): two small matrices, entry by entry.
        return abs(self.scaling) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))

    def rows(self, first: int, count: int) -> "Pair":
        """Return the part that changes some rows of the weight."""
        cut = slice(first, first + count)
        magnitude = None if self.magnitude is None else self.magnitude[cut]
        return replace(self, b=self.b[cut].contiguous(), magnitude=magnitude)

    def swapped(self) -> "Pair":
        """Return the pair with the halves of its rows exchanged."""
        half = len(self.b) // 2
        magnitude = None if self.magnitude is None else self.magnitude.roll(half)
        return replace(self, b=self.b.roll(half, dims=0), magnitude=magnitude)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the factor B of a module stands in the file."""

    key: str
    first: int
    """Row at which it begins; a key may hold several layers."""
    swapped: bool
    """The halves of its rows stand there in the other order."""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """The modules of a file, by component and module of the pipeline it is for."""

    modules: dict[Place, Pair | Product]
    sources: dict[Place, Source]
    """Of the pairs; modules that only diffusers' converters placed have none."""
    embeddings: tuple[str, ...]
    """Names of embeddings in the file, which are left out."""


def read_lora(pipeline: Any, path: Path) -> LoraFile:
    """Return a LoRA file as this pipeline names its modules.

    Raises:
        ModelError: It is no LoRA, not whole, names layers that the pipeline does not have, or sets
            something that is not applied here.
    """
    raw = read_tensors(path)
    embeddings = take_embeddings(raw)
    try:
        products, magnitudes = take_products(raw), take_magnitudes(raw)
        fold_tucker(raw)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be read: {error}. {MERGE}") from error
    if both := sorted(products.keys() & magnitudes.keys()):
        algorithm = products[both[0]].algorithm
        raise ModelError(f"{path} is a DoRA of a {algorithm}, which PEFT does not read. {MERGE}")
    if any(stem.startswith(PEFT_PREFIX) for stem in products):
        config_beside(path)  # says that these are no LoRA, or what is missing
    live = LiveNames(pipeline)
    modules: dict[Place, Pair | Product] = {}
    sources: dict[Place, Source] = {}
    if raw or not products:
        check_pairs(raw, path)
        modules |= _pairs(pipeline, live, raw, magnitudes, path, sources)
    names = _names(pipeline, live, list(products), path)
    modules |= {names[stem]: product for stem, product in products.items()}
    return LoraFile(modules=modules, sources=sources, embeddings=tuple(embeddings))


def _pairs(
    pipeline: Any, live: LiveNames, raw: Mapping[str, Tensor], magnitudes: Mapping[str, Tensor],
    path: Path, sources: dict[Place, Source],
) -> dict[Place, Pair]:  # fmt: skip
    """Return the pairs of factors of a file by their places; `sources` takes where they stand."""
    stems: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, str] = {}
    for key, value in raw.items():
        stem, tensor = split_key(key) or (key, "")
        stems.setdefault(stem, {})[tensor] = value
        if tensor == "B":
            keys[stem] = key
    alphas = _alphas(stems, path)
    pairs: dict[Place, Pair] = {}
    unplaced: dict[str, Pair] = {}
    for stem, factors in stems.items():
        pair = Pair(a=factors["A"], b=factors["B"], alpha=alphas[stem],
                    magnitude=magnitudes.get(stem))  # fmt: skip
        places, first = live.locate(stem, len(pair.b)), 0
        if places is None:
            unplaced[stem] = pair
        for place in places or ():
            count = live.rows(place) if len(places or ()) > 1 else len(pair.b)
            part, swapped = pair.rows(first, count), live.swaps(stem, place)
            _put(pairs, place, part.swapped() if swapped else part, path)
            sources[place] = Source(key=keys[stem], first=first, swapped=swapped)
            first += count
    for place, pair in _converted(pipeline, live, unplaced, path).items():
        _put(pairs, place, pair, path)
    decomposed = {place[0] for place, pair in pairs.items() if pair.magnitude is not None}
    if bare := [".".join(place) for place, pair in pairs.items()
                if place[0] in decomposed and pair.magnitude is None]:  # fmt: skip
        raise ModelError(
            f"{path} is a DoRA in some modules and not in {len(bare)}: {name_some(bare)}. {MERGE}"
        )
    return pairs


def _put(pairs: dict[Place, Pair], place: Place, pair: Pair, path: Path) -> None:
    if place in pairs:
        raise ModelError(f"{path} changes {'.'.join(place)} twice. {MERGE}")
    pairs[place] = pair


def _alphas(stems: Mapping[str, Mapping[str, Tensor]], path: Path) -> dict[str, float | None]:
    """Return the alpha of each module: as its key says, or PEFT's configuration.

    Raises:
        ModelError: PEFT's configuration is missing, not to be used, or says something else.
    """
    configs = configs_in_header(path)
    beside = config_beside(path) if any(stem.startswith(PEFT_PREFIX) for stem in stems) else None
    alphas: dict[str, float | None] = {}
    for stem, factors in stems.items():
        component, _, name = stem.partition(".")
        config = configs.get(component)
        if beside and stem.startswith(PEFT_PREFIX):
            config, name = beside, stem.removeprefix(PEFT_PREFIX)
        said = float(factors["alpha"]) if "alpha" in factors else None
        alpha = config.alpha_of(name, len(factors["A"])) if config else said
        if config and said is not None and not math.isclose(said, alpha or 0.0, rel_tol=CLOSE):
            raise ModelError(
                f"{path} gives {stem} the alpha {said:g}, {config.where} {alpha:g}. Remove the one "
                "that the training did not use."
            )
        alphas[stem] = alpha
    return alphas


def _converted(
    pipeline: Any, live: LiveNames, pairs: Mapping[str, Pair], path: Path
) -> dict[Place, Pair]:
    """Return pairs whose names only diffusers' converters know, by their places.

    Converters skip what they do not know, and some forget scales; what they return must change the
    weights by as much as what they were given.

    Raises:
        ModelError: They do not know the names, or lose something.
    """
    if not pairs:
        return {}
    given: dict[str, Tensor] = {}
    for stem, pair in pairs.items():
        down, up = FACTORS[1 if "." in stem else 0]
        # B takes the scale, so that nothing is left to forget.
        given |= {f"{stem}{down}": pair.a.float(), f"{stem}{up}": pair.b.float() * pair.scaling}
    factors = _factors(by_diffusers(pipeline, given, path), path)
    found = {place: Pair(a=pair["A"], b=pair["B"], alpha=None) for place, pair in factors.items()}
    before, after = (math.hypot(*(pair.size() for pair in group.values()))
                     for group in (pairs, found))  # fmt: skip
    if not math.isclose(before, after, rel_tol=CLOSE):
        raise ModelError(
            f"{path}: diffusers' converter makes a change of size {after:.4g} of {before:.4g} from "
            f"{counted(len(pairs), 'module', 'modules')} such as {name_some(pairs, 2)}: it does "
            f"not know all of them. {MERGE}"
        )
    decomposed = {
        stem: pair.magnitude for stem, pair in pairs.items() if pair.magnitude is not None
    }
    for stem, place in _names(pipeline, live, list(decomposed), path).items():
        found[place] = replace(found[place], magnitude=decomposed[stem])
    return found


def _names(pipeline: Any, live: LiveNames, stems: Sequence[str], path: Path) -> dict[str, Place]:
    """Return the one place of each module that cannot be split.

    Where the live network does not know a name, diffusers' converters may, for LoRA alone. So it
    is sent through them as a LoRA of one number, its index, which says afterwards which name it
    was: with ["lora_unet_x"], "lora_unet_x.lora_down.weight" = [[0]] comes back as
    "transformer.y.lora_A.weight" = [[0]].
    """
    found = {stem: live.locate(stem, None) for stem in stems}
    names = {stem: places[0] for stem, places in found.items() if places}
    sent = [stem for stem in stems if stem not in names]
    tagged: dict[str, Tensor] = {}
    for index, stem in enumerate(sent):
        down, up = FACTORS[1 if "." in stem else 0]
        tagged |= {f"{stem}{down}": torch.full((1, 1), index), f"{stem}{up}": torch.ones(1, 1)}
    if tagged:
        for place, factors in _factors(by_diffusers(pipeline, tagged, path), path).items():
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
            f"{path}: {counted(len(stray), 'key', 'keys')} that nothing reads: {name_some(stray)}. "
            "Give the base model that it was trained on."
        )
    return factors


def _place(key: str) -> Place:
    """Return component and module of a converted factor's key."""
    module, _ = split_key(key) or (key, "")
    if key[len(module) :].startswith("_lora"):  # attention processors shorten the layer's name
        head, _, tail = module.replace(".processor.", ".").rpartition(".")
        long = TEXT_LAYERS if module.startswith("text_encoder") else UNET_LAYERS
        module = f"{head}.{long.get(tail, tail)}"
    component, _, name = module.replace(".text_model.", ".", 1).partition(".")
    return component, name
