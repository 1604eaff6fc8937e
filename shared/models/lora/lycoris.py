"""What LyCORIS writes besides plain LoRA: LoHa, LoKr, LoCon in Tucker's form, DoRA."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...dependencies import require

HADAMARD = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LEFT = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
RIGHT = (
    {"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_t2", "lokr_w2_a", "lokr_w2_b"},
)  # fmt: skip
WHOLE = {
    "loha": [HADAMARD, HADAMARD | {"hada_t1", "hada_t2"}],
    "lokr": [left | right for left in LEFT for right in RIGHT],
}
"""Per kind, the factors that make a module."""
MAGNITUDES = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight",
              ".lora_magnitude_vector.default.weight")  # fmt: skip
"""What ends the key of a DoRA's magnitudes: LyCORIS, then PEFT and diffusers."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """One module of a LoHa or LoKr: a change of a weight, written as a product of small factors.

    LoHa (Hyeon-Woo et al., arXiv:2108.06098): (w1_a w1_b) * (w2_a w2_b), entry by entry.
    LoKr (Yeh et al., arXiv:2309.14859): the Kronecker product of w1 and w2.
    """

    kind: Literal["loha", "lokr"]
    factors: Mapping[str, Tensor]
    """By the names that LyCORIS and PEFT share; ``t`` factors are cores of Tucker's form."""
    alpha: float | None
    """As the file says; None for the rank."""

    @property
    def scaling(self) -> float:
        """What the product is multiplied by."""
        ranks = [self.factors[name].shape[0] for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")
                 if name in self.factors]  # fmt: skip
        # A LoKr of two whole factors has no rank; LyCORIS does not scale it.
        return self.alpha / ranks[0] if self.alpha and ranks else 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the change, rows first."""
        if self.kind == "loha":
            return self._shape("hada_w1", "hada_t1")
        left, right = self._shape("lokr_w1"), self._shape("lokr_w2", "lokr_t2")
        return (left[0] * right[0], left[1] * right[1], *right[2:])

    def _shape(self, name: str, core: str = "") -> tuple[int, ...]:
        """Return the shape of a factor that may be a product itself."""
        if name in self.factors:
            return tuple(self.factors[name].shape)
        a, b = self.factors[f"{name}_a"].shape, self.factors[f"{name}_b"].shape
        if core in self.factors:
            return (a[1], b[1], *self.factors[core].shape[2:])
        return (a[0], b[1])


def take_products(raw: dict[str, Tensor]) -> dict[str, Product]:
    """Take the LoHa and LoKr modules out of a state dict; return them by the name before the dot.

    Raises:
        ValueError: A module lacks a factor, or has one too many; names it.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in raw if ".hada_" in key or ".lokr_" in key]:
        stem, _, factor = key.rpartition(".")
        found.setdefault(stem, {})[factor] = raw.pop(key)
    products = {}
    for stem, factors in found.items():
        kind = next((kind for kind, whole in WHOLE.items() if set(factors) in whole), None)
        if kind is None:
            has = ", ".join(sorted(factors))
            raise ValueError(f"{stem} has the factors {has}, which make no LoHa and no LoKr")
        alpha = raw.pop(f"{stem}.alpha", None)
        products[stem] = Product(
            kind=kind, factors=factors, alpha=None if alpha is None else float(alpha)
        )
    return products


def take_magnitudes(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take DoRA's magnitudes [out] out of a state dict; return them by the name before the ending.

    Raises:
        ValueError: They are one per input of the module, not one per output; names it.
    """
    found = {}
    for key in list(raw):
        if end := next((end for end in MAGNITUDES if key.endswith(end)), None):
            value = raw.pop(key)
            if end == MAGNITUDES[0] and len(value) != value.numel():
                raise ValueError(f"{key} holds magnitudes of inputs, PEFT those of outputs")
            found[key.removesuffix(end)] = value.flatten()
    return found


def fold_tucker(raw: dict[str, Tensor]) -> None:
    """Put the core of LoCon's Tucker form into the factor before it, which changes no product."""
    for key in [key for key in raw if key.endswith(".lora_mid.weight")]:
        down = f"{key.removesuffix('.lora_mid.weight')}.lora_down.weight"
        raw[down] = torch.einsum("abkl,bi->aikl", raw.pop(key), raw[down].flatten(1))


@torch.no_grad()
def attach_products(part: nn.Module, products: Mapping[str, Product], adapter: str) -> None:
    """Put LoHa and LoKr modules on the layers of a network, as layers of PEFT.

    Args:
        part: The network; when this raises, `detach_products` brings it back.
        products: By the full name of the layer they change.
        adapter: Name by which PEFT knows them.

    Raises:
        RuntimeError: The factors of a module do not fit together, or not to its layer.
    """
    peft = require("peft", purpose="Loading a LoHa or LoKr", extra="models")
    configs = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}
    for kind in sorted({product.kind for product in products.values()}):
        names = [name for name, product in products.items() if product.kind == kind]
        config = configs[kind](r=1, alpha=1, target_modules="|".join(map(re.escape, names)))
        with warnings.catch_warnings():
            # A file may hold several kinds, each on layers of its own.
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            peft.inject_adapter_in_model(config, part, f"{adapter}_{kind}")
        for name in names:
            _fill(part.get_submodule(name), products[name], f"{adapter}_{kind}")


def _fill(layer: nn.Module, product: Product, adapter: str) -> None:
    """Replace the factors that PEFT made by those of a file."""
    weight = layer.get_base_layer().weight
    for name in layer.adapter_layer_names:
        factors = getattr(layer, name)
        if adapter in factors:
            del factors[adapter]
        if name in product.factors:
            value = product.factors[name].to(weight)
            factors[adapter] = nn.Parameter(value, requires_grad=False)
    layer.scaling[adapter] = product.scaling
    layer.get_delta_weight(adapter)


def detach_products(part: nn.Module, products: Mapping[str, Product], adapter: str) -> None:
    """Put back the layers that `attach_products` has replaced, as far as it came."""
    for name, product in products.items():
        layer, known = part.get_submodule(name), f"{adapter}_{product.kind}"
        if known in getattr(layer, "scaling", {}):
            above, _, own = name.rpartition(".")
            setattr(part.get_submodule(above), own, layer.base_layer)
        getattr(part, "peft_config", {}).pop(known, None)
