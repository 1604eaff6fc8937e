"""Subspaces of single layers, by the layer's name: a value, and its file."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...arrays import Tensor
from ...files.storage import replace_atomically
from ...files.weights import ModelError, check_finite, read_header
from ...wording import counted, name_some
from ..concept.subspace import ConceptSubspace, provenance_in
from .names import cores
from .regions import ConceptRegions

HEADER = "unmemorize.layers"
"""Where a file keeps the provenance, as JSON."""
REGIONS = "unmemorize.regions"
"""Where a file keeps units, limit and noise level of its regions, as JSON."""
CENTRE = "centre/"
"""Before the layer's name of a centre of the regions."""
DEPENDENT = 1e-10
"""Singular values of several bases side by side up to this are rounding."""


def holds_layers(path: Path) -> bool:
    """Return whether a file holds subspaces of layers, as `LayerSubspaces.save` wrote them.

    Raises:
        ModelError: The file is missing, or not a whole safetensors file.
    """
    from safetensors import safe_open

    read_header(path)
    with safe_open(path, "pt") as file:
        return HEADER in (file.metadata() or {})


@dataclass(frozen=True, kw_only=True)
class LayerSubspaces:
    """What each layer must not read of its own input."""

    bases: Mapping[str, Tensor]
    """By layer [width rank], orthonormal columns, float64 on the CPU; rank 0 forbids nothing."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How they were made: plain data, kept with the file."""
    regions: ConceptRegions | None = None
    """Where pictures show the concept, by some of the layers, as they were measured. None where no
    layer tells places apart, and in files of earlier versions."""

    def __post_init__(self):
        for name, basis in self.bases.items():
            try:
                ConceptSubspace(basis=basis)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the bases by these names of the layers, in whatever dialect they are.

        A network, its LoRA and the saved file put different words before the same name. Where one
        layer stands for several of the same input, its basis spans all of theirs.

        Raises:
            ValueError: One of the layers is not among the names.
        """
        known = {core: name for name in names for core in cores(name)}
        if missing := [name for name in self.bases if cores(name)[0] not in known]:
            told = counted(len(missing), "layer is", "layers are")
            raise ValueError(f"{told} not there: {name_some(missing, 3)}.")
        joined: dict[str, list[Tensor]] = {}
        for name, basis in self.bases.items():
            joined.setdefault(known[cores(name)[0]], []).append(basis)
        return {name: _span(bases) for name, bases in joined.items()}

    def among(self, names: Iterable[str]) -> "LayerSubspaces":
        """Return the subspaces of those layers that are among these names, in any dialect."""
        known = {core for name in names for core in cores(name)}
        bases = {name: basis for name, basis in self.bases.items() if cores(name)[0] in known}
        return replace(self, bases=bases)

    def save(self, path: Path) -> None:
        """Write a safetensors file with the provenance in its header, whole or not at all."""
        from safetensors.torch import save_file

        header = {HEADER: json.dumps(dict(self.provenance), sort_keys=True)}
        tensors = dict(self.bases)
        if found := self.regions:
            told = {"units": dict(found.units), "limit": found.limit, "sigma": found.sigma}
            header[REGIONS] = json.dumps(told, sort_keys=True)
            tensors |= {CENTRE + name: centre for name, centre in found.centres.items()}
        with replace_atomically(path) as part:
            save_file({n: t.contiguous() for n, t in tensors.items()}, part, metadata=header)

    @classmethod
    def load(cls, path: Path) -> "LayerSubspaces":
        """Read a file that `save` wrote.

        Raises:
            ModelError: The file is missing, cut, or of another kind.
        """
        from safetensors import safe_open

        read_header(path)
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            if header is None:
                raise ModelError(f"{path} holds no subspaces of layers that this package wrote.")
            regions = (file.metadata() or {}).get(REGIONS)
            bases = {key: file.get_tensor(key) for key in file.keys()}
        check_finite(bases, str(path))
        try:
            found = None if regions is None else _regions_in(regions, bases)
            return cls(bases=bases, provenance=provenance_in(header), regions=found)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path} is damaged: {error}") from error


def _regions_in(header: str, tensors: dict[str, Tensor]) -> ConceptRegions:
    """Return the regions of a file, and take their tensors away from those of the subspaces."""
    told = json.loads(header)
    centres = {name: tensors.pop(CENTRE + name) for name in told["units"]}
    return ConceptRegions(bases={name: tensors[name] for name in centres}, centres=centres, **told)


def _span(bases: Sequence[Tensor]) -> Tensor:
    """Return one basis for the span of several of the same width; of equal ones the first."""
    if all(torch.equal(basis, bases[0]) for basis in bases[1:]):
        return bases[0]
    directions, lengths, _ = torch.linalg.svd(torch.cat(list(bases), dim=1), full_matrices=False)
    return directions[:, lengths > DEPENDENT]
