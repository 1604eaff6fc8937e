"""LoKr and LoHa kept off a subspace by one of their factors, exactly.

The change of the weight is a product of small matrices, and the input is read through two of them.
For any values of the others, Delta V = 0 holds where one of the two keeps off a larger subspace:

- LoKr, Delta = W1 (x) W2 (arXiv:2309.14859): Delta v = 0 where W2 leaves out every row of v, read
  as a matrix [entries of W1's input, entries of W2's]. That subspace depends on V alone.
- LoHa, Delta = (W1a W1b) * (W2a W2b) (arXiv:2108.06098): Delta v = 0 where W2b leaves out v * b for
  every row b of W1b. That subspace moves with W1b, and is built anew whenever W2b is projected.

Both take more than V; `Projection` refuses where nothing would be left.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ...arrays import Float, Tensor

READING = re.compile(r"\.(lokr_w2|lokr_w2_b|hada_w2_b)$")
"""The factor that is projected. Where LoKr splits W2, its second part alone reads the input."""
BESIDE = re.compile(r"\.(lokr_w1|lokr_w1_[ab]|lokr_w2_a|hada_w1_[ab]|hada_w2_a|scalar)$")
"""What may have any value beside it; LyCORIS' scalar multiplies the whole change."""
OUTER = re.compile(r"\.(lokr_w1|lokr_w1_b)$")
PARTNER = re.compile(r"\.hada_w1_b$")
SMALLEST = 1e-10
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True, kw_only=True)
class Products:
    """What of a network's other factors decides which subspace a reading factor is kept off."""

    outer: Mapping[str, int] = field(default_factory=dict)
    """Of LoKr, by module: entries of the input that W1 reads."""
    partners: Mapping[str, Tensor] = field(default_factory=dict)
    """Of LoHa, by module: W1b, [rank width]."""

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]], modules: Iterable[str]) -> "Products":
        """Find them among a network's parameters or a file's tensors.

        Args:
            named: Tensors by their whole names.
            modules: Those that are projected.
        """
        wanted, outer, partners = set(modules), {}, {}
        for name, tensor in named:
            module = name.rpartition(".")[0]
            if module not in wanted:
                continue
            if OUTER.search(name):
                outer[module] = tensor.shape[1]
            elif PARTNER.search(name):
                partners[module] = tensor
        return cls(outer=outer, partners=partners)


def kronecker_basis(
    basis: Float[Tensor, "width rank"], inner: int
) -> Float[Tensor, "inner larger"]:
    """Return an orthonormal basis of what LoKr's W2 must leave out.

    Args:
        basis: Of the subspace, orthonormal, in float64.
        inner: Entries of the input that W2 reads, of which one entry of W1's stands for each block.
    """
    rows = basis.T.reshape(-1, inner)
    if not len(rows):
        return basis.new_zeros(inner, 0)
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions[values > SMALLEST * values.max()].T


def hadamard_columns(
    basis: Float[Tensor, "width rank"], partner: Float[Tensor, "row width"]
) -> Float[Tensor, "width columns"]:
    """Return what LoHa's W2b must leave out: each direction times each row of W1b."""
    return (basis[:, :, None] * partner.T[:, None, :]).flatten(1)


def hadamard_basis(columns: Float[Tensor, "width columns"]) -> Float[Tensor, "width columns"]:
    """Return an orthonormal basis that holds the span of the columns."""
    return torch.linalg.qr(columns).Q
