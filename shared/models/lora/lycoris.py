"""What LyCORIS writes besides plain LoRA: LoHa, LoKr, LoCon in Tucker's form, DoRA."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .dialects import split_key

Algorithm = Literal["loha", "lokr"]
HADAMARD = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LEFT = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
RIGHT = (
    {"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_t2", "lokr_w2_a", "lokr_w2_b"},
)  # fmt: skip
WHOLE: dict[Algorithm, list[set[str]]] = {
    "loha": [HADAMARD, HADAMARD | {"hada_t1", "hada_t2"}],
    "lokr": [left | right for left in LEFT for right in RIGHT],
}
"""Per algorithm, the sets of factors that make a module."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """One module of a LoHa or LoKr: a change of a weight, written as a product of small factors.

    LoHa (Hyeon-Woo et al., arXiv:2108.06098): (w1_a w1_b) * (w2_a w2_b), entry by entry.
    LoKr (Yeh et al., arXiv:2309.14859): the Kronecker product of w1 and w2.
    """

    algorithm: Algorithm
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
    def settings(self) -> tuple:
        """What a layer of PEFT is made for; modules that agree in it are made at once."""
        return (self.algorithm,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the change, rows first."""
        if self.algorithm == "loha":
            return self._shape("hada_w1", "hada_t1")
        left, right = self._shape("lokr_w1"), self._shape("lokr_w2", "lokr_t2")
        return (left[0] * right[0], left[1] * right[1], *right[2:])

    def size(self) -> float:
        """Return the Frobenius norm of the change."""
        if self.algorithm == "loha":
            product = self._whole("hada_w1", "hada_t1") * self._whole("hada_w2", "hada_t2")
            return abs(self.scaling) * float(product.norm())
        # A Kronecker product holds every product of two entries.
        left, right = self._whole("lokr_w1"), self._whole("lokr_w2", "lokr_t2")
        return abs(self.scaling) * float(left.norm()) * float(right.norm())

    def _whole(self, name: str, core: str = "") -> Tensor:
        """Return a factor that may be a product itself, in float64."""
        f = {key: value.double() for key, value in self.factors.items()}
        if name in f:
            return f[name]
        a, b = f[f"{name}_a"], f[f"{name}_b"]
        return torch.einsum("abkl,ap,bi->pikl", f[core], a, b) if core in f else a @ b

    def _shape(self, name: str, core: str = "") -> tuple[int, ...]:
        """Return the shape of a factor that may be a product itself."""
        if name in self.factors:
            return tuple(self.factors[name].shape)
        a, b = self.factors[f"{name}_a"].shape, self.factors[f"{name}_b"].shape
        if core in self.factors:
            return (a[1], b[1], *self.factors[core].shape[2:])
        return (a[0], b[1])


def take_products(raw: dict[str, Tensor]) -> dict[str, Product]:
    """Take the LoHa and LoKr modules out of a state dict; return them by the key's module.

    Raises:
        ValueError: A module lacks a factor, or has one too many; names it.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key in list(raw):
        module, factor = split_key(key) or ("", "")
        if factor.startswith(("hada_", "lokr_")):
            modules.setdefault(module, {})[factor] = raw.pop(key)
    products = {}
    for module, factors in modules.items():
        algorithm = next((a for a, whole in WHOLE.items() if factors.keys() in whole), None)
        if algorithm is None:
            has = ", ".join(sorted(factors))
            raise ValueError(f"{module} has the factors {has}, which make no LoHa and no LoKr")
        alpha = raw.pop(f"{module}.alpha", None)
        products[module] = Product(
            algorithm=algorithm, factors=factors, alpha=None if alpha is None else float(alpha)
        )
    return products


def take_magnitudes(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take DoRA's magnitudes [out] out of a state dict; return them by the key's module.

    Raises:
        ValueError: They are one per input of the module, not one per output; names it.
    """
    magnitudes = {}
    for key in list(raw):
        module, tensor = split_key(key) or ("", "")
        if tensor == "magnitude":
            value = raw.pop(key)
            if key.endswith(".dora_scale") and len(value) != value.numel():
                raise ValueError(f"{key} holds magnitudes of inputs, PEFT those of outputs")
            magnitudes[module] = value.flatten()
    return magnitudes


def fold_tucker(raw: dict[str, Tensor]) -> None:
    """Put the core of LoCon's Tucker form into the factor before it, which changes no product."""
    for key in [key for key in raw if key.endswith(".lora_mid.weight")]:
        down = f"{key.removesuffix('.lora_mid.weight')}.lora_down.weight"
        raw[down] = torch.einsum("abkl,bi->aikl", raw.pop(key), raw[down].flatten(1))
