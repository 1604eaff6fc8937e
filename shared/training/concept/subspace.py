"""The subspace of a concept in the input space of text-fed layers: a value, and its file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...arrays import Float, Tensor
from ...files.storage import replace_atomically
from ...files.weights import ModelError, check_finite, read_header

KEY = "basis"
HEADER = "unmemorize.subspace"
"""Where a file keeps the provenance, as JSON."""
ORTHONORMAL = 1e-8
"""How far the basis may be from orthonormal, largest entry of its Gram matrix minus I."""


@dataclass(frozen=True, kw_only=True)
class ConceptSubspace:
    """What text-fed layers of one input width must not read."""

    basis: Tensor
    """[width rank], orthonormal columns, float64 on the CPU; rank 0 is the empty subspace."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How it was made and how it did on held-out prompts: plain data, kept with the file."""

    def __post_init__(self):
        if self.basis.ndim != 2 or self.basis.dtype != torch.float64:
            shape, dtype = tuple(self.basis.shape), self.basis.dtype
            raise ValueError(f"`basis` must be [width rank] in float64, got {shape} in {dtype}.")
        if not torch.isfinite(self.basis).all():
            raise ValueError("`basis` must be finite, got NaN or infinity.")
        error = self.basis.T @ self.basis - torch.eye(self.rank, dtype=torch.float64)
        if self.rank and error.abs().max() > ORTHONORMAL:
            raise ValueError(f"`basis` must be orthonormal, is off by {error.abs().max():.1e}.")

    @property
    def width(self) -> int:
        """Of the inputs it is for."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """Dimensions of the concept."""
        return self.basis.shape[1]

    @classmethod
    def empty(cls, width: int) -> "ConceptSubspace":
        """Return the subspace that holds nothing."""
        return cls(basis=torch.zeros(width, 0, dtype=torch.float64))

    def save(self, path: Path) -> None:
        """Write a safetensors file with the provenance in its header, whole or not at all."""
        from safetensors.torch import save_file

        header = {HEADER: json.dumps(dict(self.provenance), sort_keys=True)}
        with replace_atomically(path) as part:
            save_file({KEY: self.basis.contiguous()}, part, metadata=header)

    @classmethod
    def load(cls, path: Path, *, width: int | None = None) -> "ConceptSubspace":
        """Read a file that `save` wrote.

        Args:
            path: The safetensors file.
            width: Of the layers it is for; None takes what the file says.

        Raises:
            ModelError: The file is missing, cut, of another kind, or its subspace does not fit.
        """
        from safetensors import safe_open

        tensors = read_header(path)
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            if set(tensors) != {KEY} or header is None:
                raise ModelError(f"{path} is not a concept subspace that this package wrote.")
            basis = file.get_tensor(KEY)
        check_finite({KEY: basis}, str(path))
        try:
            subspace = cls(basis=basis, provenance=provenance_in(header))
        except ValueError as error:
            raise ModelError(f"{path} is damaged: {error}") from error
        if width not in (None, subspace.width):
            raise ModelError(
                f"{path} is for text states of width {subspace.width}, this model's have {width}. "
                "Build the subspace with the model that is trained."
            )
        return subspace


def provenance_in(header: str) -> dict[str, Any]:
    """Return the provenance that a file's header holds.

    Raises:
        ValueError: It is not JSON, or not an object.
    """
    provenance = json.loads(header)
    if not isinstance(provenance, dict):
        raise ValueError(f"its provenance is {header[:20]!r}, not an object.")
    return provenance


def remove(
    x: Float[Tensor, " *batch width"], basis: Float[Tensor, " *stack width rank"]
) -> Float[Tensor, " *batch width"]:
    """Return x (I - V V^T), what is left of `x` outside the span of `basis`.

    Several bases, [stack width rank], are for as many slices of x, [stack row width].
    """
    return x - (x @ basis) @ basis.mT


ROUNDING = 1e-10
"""Gains below this share of the concept's energy are rounding."""


def contrast(
    concept: Float[Tensor, "row width"], retained: Float[Tensor, "other width"], price: float
) -> tuple[Float[Tensor, "width rank"], Float[Tensor, " rank"]]:
    """Return orthonormal directions that are worth their price, the best first, and their energy.

    With E = concept^T concept and G = retained^T retained these are the eigenvectors of E - price G
    with positive eigenvalues. Of all subspaces, of any rank, theirs has the largest
    tr V^T (E - price G) V (Ky Fan, 1949).

    Args:
        concept: What the subspace is to hold, in float64; the caller sees to the scale of both.
        retained: What it is to leave alone; without any this is an SVD of `concept`.
        price: Energy of `concept` that a direction must hold for one of `retained`, >= 0.

    Returns:
        Columns V, and of each its energy |concept v|^2.
    """
    rows = torch.cat([concept, retained])
    # All eigenvectors of interest lie in the span of the rows, which may be few among many
    # coordinates: no matrix of width x width is made then.
    span = torch.linalg.qr(rows.T).Q
    inside, outside = concept @ span, retained @ span
    values, vectors = torch.linalg.eigh(inside.T @ inside - price * (outside.T @ outside))
    worth = values > ROUNDING * concept.square().sum()
    vectors = vectors[:, worth].flip(1)
    return span @ vectors, (inside @ vectors).square().sum(0)


def leading(energies: Float[Tensor, " direction"], share: float, total: float, most: int) -> int:
    """Return how many of the first energies reach a share of `total`, `most` at most."""
    reached = energies.cumsum(0) >= share * total * (1 - 1e-12)
    return min(most, len(energies), int((~reached).sum()) + 1)
