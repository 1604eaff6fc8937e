"""Which factors of a LoRA are kept off a subspace: in a live network, and in a file."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ...wording import name_some
from ..layers.subspaces import LayerSubspaces
from .factors import TEXT_FED, UnsupportedTraining, factors_of, text_factors


def guarded_factors(
    network: nn.Module | Iterable[tuple[str, nn.Parameter]],
    *,
    text: bool,
    layers: LayerSubspaces | None,
) -> dict[str, nn.Parameter]:
    """Return by module the down factors that are projected while a LoRA is trained.

    With subspaces of layers no layer of the LoRA may be without one: what it must not learn, it
    would learn there. Subspaces of layers that it does not train are left aside.

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
    factors |= text_factors(named, text_fed="")
    own = layers.among(factors).of(factors)
    bare = [
        name for name in factors if name not in own and not (text and re.search(TEXT_FED, name))
    ]
    if bare:
        raise UnsupportedTraining(
            f"{len(bare)} of the LoRA's {len(factors)} layers have no subspace: "
            f"{name_some(bare, 3)}. Those that read text directly take the concept's names; for "
            "the others build the file of layers with the model that is trained, or train only "
            "layers that it holds."
        )
    return factors


def guarded_in(
    state: Mapping[str, Tensor], *, text: bool, layers: LayerSubspaces | None, source: str
) -> dict[str, Tensor]:
    """Return by module those factors of a saved LoRA that must be outside a subspace.

    Args:
        state: In the keys of kohya, PEFT or diffusers.
        text: Layers that read text directly are among them.
        layers: Subspaces of single layers, each of which the LoRA must have; None for none.
        source: What it is, for the message.

    Raises:
        ModelError: It changes a text encoder, or no layer reads text that should.
        ValueError: It lacks one of the layers.
    """
    factors = factors_of(state, source=source) if text else {}
    if layers is not None:
        every = factors_of(state, text_fed="", source=source)
        factors |= {name: every[name] for name in layers.of(every)}
    return factors
