"""Which LoRA factors read text, in a live network and in a file; what cannot be kept exact."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ...files.weights import ModelError, read_tensors
from ...models.lora.dialects import check_pairs, split_key
from ...models.lora.layer_names import TEXT_FED
from ...wording import name_some
from ..layers.subspaces import LayerSubspaces
from .products import BESIDE, READING

TEXT_ENCODER = r"(^|\.)(lora_te\d?_|text_encoder(_\d)?\.|text_model\.)"
"""Parameters of a text encoder, in the names of trainers."""
DOWN = re.compile(r"\.(?:lora_down|lora_A|lora\.down)(?:\.[^.]+)?\.weight$")
UP = re.compile(r"\.(?:lora_up|lora_B|lora\.up)(?:\.[^.]+)?\.weight$")
"""What ends the names of live factors, an adapter's name in between (PEFT)."""
OTHER_METHODS = {
    "hada_t": "LoHa in Tucker form: its core reads what the other factors read",
    "lokr_t": "LoKr in Tucker form: its core reads what the other factors read",
    "hada_": "LoHa with names or shapes that are not known here",
    "lokr_": "LoKr with names or shapes that are not known here",
    "lora_magnitude_vector": "DoRA: it rescales the base weight, and what that reads with it",
    "dora_scale": "DoRA: it rescales the base weight, and what that reads with it",
    "ia3_": "(IA)3: it rescales the base weight's output, whatever was read",
    "oft_": "OFT: it rotates the base weight",
    "lora_": "not a plain pair of factors: AdaLoRA, a bias, or the like",
}
"""Marks of parametrizations in names, and why A V = 0 says nothing for them."""


class UnsupportedTraining(ValueError):
    """The projection would not be exact for what is trained; the message says which part."""


def text_factors(
    network: nn.Module | Iterable[tuple[str, nn.Parameter]], text_fed: str = TEXT_FED
) -> dict[str, nn.Parameter]:
    """Return the factors that read the input of text-fed layers, by module.

    With y = W x + s B A x, A V = 0 gives B A V = 0 for every B. A convolution's down factor is
    exact too, of any kernel: it is a linear map of the channels at each place of the kernel. Of
    LoKr and LoHa it is the factor that `products` describes. Parameters of a text encoder are
    passed over: what it gives once it is trained is not what the subspace was built from
    (`trains_text_encoder`).

    Args:
        network: The LoRA's network or the whole model, or its named parameters.
        text_fed: Regular expression searched in module names.

    Raises:
        UnsupportedTraining: No LoRA reads text, or something else that reads text states is
            trained: full weights, DoRA, (IA)3, a convolution's LoHa.
    """
    named = network.named_parameters() if isinstance(network, nn.Module) else network
    factors, faults = {}, []
    for name, parameter in named:
        down = DOWN.search(name) or (READING.search(name) if parameter.ndim == 2 else None)
        if re.search(TEXT_ENCODER, name):
            continue
        if down and re.search(text_fed, module := name[: down.start()]):
            if module in factors:
                faults.append(f"{name} (a second factor that reads what another one reads)")
            factors[module] = parameter
        elif parameter.requires_grad and not _beside(name) and _feeds(name, text_fed):
            reasons = (why for mark, why in OTHER_METHODS.items() if mark in name)
            faults.append(f"{name} ({next(reasons, 'full fine-tuning: the weight itself moves')})")
    if faults:
        raise UnsupportedTraining(
            "Projection is exact for plain LoRA, LoKr and LoHa on text-fed layers. "
            f"Also trained: {name_some(faults, 3)}."
        )
    if not factors:
        raise UnsupportedTraining(
            "No LoRA reads the text encoder's output directly, so there is nothing to project. "
            "Joint-attention models (SD3, Flux) read it through entry layers; their other layers "
            "can be kept off subspaces of their own, built from images."
        )
    return factors


def projected_factors(
    network: nn.Module | Iterable[tuple[str, nn.Parameter]],
    *,
    text: bool,
    layers: LayerSubspaces | None,
) -> dict[str, nn.Parameter]:
    """Return by module the down factors that are projected while a LoRA is trained.

    With subspaces of layers, every layer of the LoRA must have one: the LoRA would learn the
    concept in a layer without. Subspaces of layers that the LoRA does not train are ignored.

    Args:
        network: The LoRA's network or the whole model, or its named parameters.
        text: Layers that read text directly have a subspace of text states.
        layers: Subspaces of single layers, None for none.

    Raises:
        UnsupportedTraining: The projection would not be exact for what is trained.
    """
    named = list(network.named_parameters() if isinstance(network, nn.Module) else network)
    factors = text_factors(named) if text else {}
    if layers is None:
        return factors
    if product := [name for name, _ in named if READING.search(name)]:
        raise UnsupportedTraining(
            f"Layers that read no text are kept off a subspace with a plain LoRA only, and "
            f"{product[0]} is LoKr or LoHa: use a plain LoRA, or leave out project_layers."
        )
    factors |= text_factors(named, text_fed="")
    own = layers.among(factors).of(factors)
    bare = [
        name for name in factors if name not in own and not (text and re.search(TEXT_FED, name))
    ]
    if bare:
        raise UnsupportedTraining(
            f"{len(bare)} of the LoRA's {len(factors)} layers have no subspace: "
            f"{name_some(bare, 3)}. Layers that read text directly need the concept's names; for "
            "the others build the file of layers with the model that is trained, or train only "
            "layers that the file holds."
        )
    return factors


def trains_text_encoder(named: Iterable[tuple[str, nn.Parameter]]) -> bool:
    """Return whether the parameters of a text encoder are among those that are trained."""
    return any(re.search(TEXT_ENCODER, name) and each.requires_grad for name, each in named)


def saved_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a LoRA, LoKr or LoHa file of kohya, PEFT or diffusers.

    Raises:
        ModelError: The file is none, or not whole.
    """
    state = read_tensors(path)
    products = {key.rpartition(".")[0] for key in state if READING.search(key)}
    own = {key for key in state if READING.search(key) or BESIDE.search(key)}
    own |= {f"{module}.alpha" for module in products}
    if rest := {key: value for key, value in state.items() if key not in own}:
        check_pairs(rest, path)
    if lone := sorted({key.rpartition(".")[0] for key in own} - products):
        raise ModelError(f"{path}: {lone[0]} lacks a factor. Is the file truncated?")
    return state


def factors_of(
    state: Mapping[str, Tensor], text_fed: str = TEXT_FED, *, source: str = "The state dict",
    text_encoder: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the factors that read the input of text-fed layers in a state dict, by module.

    Args:
        state: In the keys of kohya, PEFT or diffusers.
        text_fed: Regular expression searched in module names.
        source: Where the state is from, for the message.
        text_encoder: It may hold a text encoder's part, which is passed over.

    Raises:
        ModelError: A text encoder is part of it, or none of its modules reads text.
    """
    encoder = {key for key in state if re.search(TEXT_ENCODER, key)}
    if encoder and not text_encoder:
        raise ModelError(f"{source} changes a text encoder too: {name_some(sorted(encoder), 3)}.")
    factors = {}
    for key, value in state.items():
        module, tensor = split_key(key) or ("", "")
        reads = tensor == "A" or READING.search(key)
        if reads and key not in encoder and re.search(text_fed, module):
            factors[module] = value
    if not factors:
        raise ModelError(f"{source} holds no LoRA factor that reads text.")
    return factors


def projected_factors_of(
    state: Mapping[str, Tensor], *, text: bool, layers: LayerSubspaces | None, source: str,
    text_encoder: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Return by module the down factors of a saved LoRA that must lie outside a subspace.

    Args:
        state: In the keys of kohya, PEFT or diffusers.
        text: Layers that read text directly are among them.
        layers: Subspaces of single layers, all of which the LoRA must have; None for none.
        source: Where the state is from, for the message.
        text_encoder: It may change a text encoder too.

    Raises:
        ModelError: It changes a text encoder, or no layer reads text where `text` is set.
        ValueError: It lacks one of the layers.
    """
    factors = factors_of(state, source=source, text_encoder=text_encoder) if text else {}
    if layers is not None:
        every = factors_of(state, text_fed="", source=source, text_encoder=text_encoder)
        factors |= {name: every[name] for name in layers.of(every)}
    return factors


def _beside(name: str) -> bool:
    """Return whether a factor may have any value beside the one that is projected."""
    return bool(UP.search(name) or BESIDE.search(name))


def _feeds(name: str, text_fed: str) -> bool:
    """Return whether a parameter belongs to a text-fed module, at any depth."""
    parts = name.split(".")
    return any(re.search(text_fed, ".".join(parts[:end])) for end in range(1, len(parts) + 1))
