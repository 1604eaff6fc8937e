"""The subspace of a concept: a basis with its file, its projection, and how directions are chosen.

It lies in the input space of the layers that read text states of one width.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...arrays import Float, Tensor
from ...files.schema import Reader
from ...files.storage import replace_atomically
from ...files.weights import ModelError, check_finite, read_header

KEY = "basis"
HEADER = "unmemorize.subspace"
"""Where a file's metadata keep the provenance, as JSON."""
DIGEST = "unmemorize.sha256"
"""Where they keep the sha256 of all else in the file."""
REBUILD = "Build it again with `unmemorize concept`."
READER = Reader(ModelError, "a file of subspaces", REBUILD)
ORTHONORMAL = 1e-8
"""How far the basis may be from orthonormal, largest entry of its Gram matrix minus I."""
ROUNDING = 1e-10
"""Gains below this share of the concept's energy are rounding."""


@dataclass(frozen=True, kw_only=True)
class ConceptSubspace:
    """What text-fed layers of one input width must not read."""

    basis: Tensor
    """[width rank], orthonormal columns, float64 on the CPU; rank 0 is the empty subspace."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How it was made and how it did on held-out prompts: plain data, kept with the file."""

    def __post_init__(self) -> None:
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
        """Write a safetensors file with the provenance in its metadata, whole or not at all."""
        save_tensors(path, {KEY: self.basis}, {HEADER: self.provenance})

    @classmethod
    def load(cls, path: Path, *, width: int | None = None) -> "ConceptSubspace":
        """Read a file that `save` wrote.

        Args:
            path: The safetensors file.
            width: Of the layers it is for; None takes any.

        Raises:
            ModelError: The file is missing, cut, of another kind, or its subspace does not fit.
        """
        otherwise = "is not a concept subspace that this package wrote"
        tensors, metadata = load_tensors(path, HEADER, otherwise, known=(HEADER,))
        if set(tensors) != {KEY}:
            raise ModelError(f"{path} {otherwise}.")
        provenance = parse_provenance(metadata[HEADER], f"{path}: the header's {HEADER}")
        try:
            subspace = cls(basis=tensors[KEY], provenance=provenance)
        except ValueError as error:
            raise ModelError(f"{path} is damaged: {error} {REBUILD}") from error
        if width not in (None, subspace.width):
            raise ModelError(
                f"{path} is for text states of width {subspace.width}, this model's have {width}. "
                "Build the subspace with the model that is trained."
            )
        return subspace


def remove(
    x: Float[Tensor, " *batch width"], basis: Float[Tensor, " *stack width rank"]
) -> Float[Tensor, " *batch width"]:
    """Return x (I - V V^T), what is left of `x` outside the span of `basis`.

    Several bases, [stack width rank], are for as many slices of x, [stack row width].
    """
    return x - (x @ basis) @ basis.mT


def contrast(
    concept: Float[Tensor, "row width"], retained: Float[Tensor, "other width"], price: float
) -> tuple[Float[Tensor, "width rank"], Float[Tensor, " rank"]]:
    """Return orthonormal directions that are worth their price, the best first, and their energy.

    With E = concept^T concept and G = retained^T retained these are the eigenvectors of E - price G
    with positive eigenvalues. Of all subspaces, of any rank, theirs has the largest
    tr V^T (E - price G) V (Ky Fan, 1949).

    Args:
        concept: What the subspace is to hold, in float64; the caller sets the scale of both.
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


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write a safetensors file with metadata as JSON, whole or not at all."""
    from safetensors.torch import save_file

    header = {name: json.dumps(dict(value), sort_keys=True) for name, value in metadata.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header[DIGEST] = _digest(tensors, header)
    with replace_atomically(path) as part:
        save_file(tensors, part, metadata=header)


def load_tensors(
    path: Path, key: str, otherwise: str, *, known: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file whose metadata hold a key.

    Args:
        path: The file.
        key: Which tells its kind.
        otherwise: Said of a file without the key.
        known: Keys of files from before there was a digest.

    Raises:
        ModelError: The file is missing, cut, damaged, holds NaN or infinity, or lacks the key.
    """
    from safetensors import safe_open

    read_header(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if key not in metadata:
            raise ModelError(f"{path} {otherwise}.")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    check_finite(tensors, str(path))
    digest = metadata.pop(DIGEST, None)
    if digest is None and (unknown := sorted(metadata.keys() - {"format", *known})):
        raise ModelError(f"{path}: its header has unknown fields {unknown}. {REBUILD}")
    if digest is not None and digest != _digest(tensors, metadata):
        raise ModelError(f"{path} is damaged: its digest is another than it was. {REBUILD}")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the sha256 of all that a file holds, in the order of its names."""
    total = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def parse_provenance(text: str, where: str) -> dict[str, Any]:
    """Return the provenance that a file's metadata hold.

    Raises:
        ModelError: It is not JSON, or not an object.
    """
    return READER.check(READER.parse(text, where), dict[str, Any], where)
