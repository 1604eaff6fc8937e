"""Subspaces of single layers, by the layer's name: a value, and its file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...arrays import Tensor
from ...files.weights import ModelError, read_header, read_metadata
from ...models.lora.layer_names import cores
from ...wording import counted, name_some
from ..concept.subspace import (
    READER,
    REBUILD,
    ConceptSubspace,
    load_tensors,
    parse_provenance,
    save_tensors,
)
from .regions import ConceptRegions

HEADER = "unmemorize.layers"
"""Where a file's metadata keep the provenance, as JSON."""
REGIONS = "unmemorize.regions"
"""Where they keep units, limit and noise level of the regions, as JSON."""
CENTRE = "centre/"
"""Before the layer's name, in the key of a centre of the regions."""
DEPENDENT = 1e-10
"""Singular values of several bases side by side up to this are rounding."""


def holds_layers(path: Path) -> bool:
    """Return whether a file holds subspaces of layers, as `LayerSubspaces.save` wrote them.

    Raises:
        ModelError: The file is missing, or not a whole safetensors file.
    """
    read_header(path)
    return HEADER in read_metadata(path)


@dataclass(frozen=True, kw_only=True)
class RegionSettings:
    """Of `ConceptRegions` what stands in a file's header."""

    units: dict[str, float]
    limit: float
    sigma: float


@dataclass(frozen=True, kw_only=True)
class LayerSubspaces:
    """What each layer must not read of its own input."""

    bases: Mapping[str, Tensor]
    """By layer [width rank], orthonormal columns, float64 on the CPU; rank 0 forbids nothing."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How they were made: plain data, kept with the file."""
    regions: ConceptRegions | None = None
    """Where images show the concept, measured with the subspaces of some of the layers. None where
    no layer tells places apart, and in files of earlier versions."""

    def __post_init__(self) -> None:
        for name, basis in self.bases.items():
            try:
                ConceptSubspace(basis=basis)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the bases by the given names of the layers, in any dialect.

        A network, its LoRA and the saved file put different words before the same name. A layer
        that joins several layers of one input gets a basis that spans all of theirs.

        Raises:
            ValueError: One of the layers is not among the names.
        """
        known = {core: name for name in names for core in cores(name)}
        if missing := [name for name in self.bases if cores(name)[0] not in known]:
            count = counted(len(missing), "layer is", "layers are")
            raise ValueError(f"{count} not there: {name_some(missing, 3)}.")
        joined: dict[str, list[Tensor]] = {}
        for name, basis in self.bases.items():
            joined.setdefault(known[cores(name)[0]], []).append(basis)
        return {name: _span(bases) for name, bases in joined.items()}

    def among(self, names: Iterable[str]) -> "LayerSubspaces":
        """Return the subspaces of the layers that have one of the names, in any dialect."""
        known = {core for name in names for core in cores(name)}
        bases = {name: basis for name, basis in self.bases.items() if cores(name)[0] in known}
        return replace(self, bases=bases)

    def save(self, path: Path) -> None:
        """Write a safetensors file with the provenance in its metadata, whole or not at all."""
        metadata: dict[str, Mapping[str, Any]] = {HEADER: self.provenance}
        tensors = dict(self.bases)
        if regions := self.regions:
            metadata[REGIONS] = {
                "units": dict(regions.units), "limit": regions.limit, "sigma": regions.sigma
            }  # fmt: skip
            tensors |= {CENTRE + name: centre for name, centre in regions.centres.items()}
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> "LayerSubspaces":
        """Read a file that `save` wrote.

        Raises:
            ModelError: The file is missing, cut, or of another kind.
        """
        bases, metadata = load_tensors(
            path, HEADER, "holds no subspaces of layers that this package wrote",
            known=(HEADER, REGIONS),
        )  # fmt: skip
        regions = None
        try:
            if REGIONS in metadata:
                where = f"{path}: the header's {REGIONS}"
                read = READER.check(READER.parse(metadata[REGIONS], where), RegionSettings, where)
                centres = {name: bases.pop(CENTRE + name) for name in read.units}
                own = {name: bases[name] for name in centres}
                regions = ConceptRegions(bases=own, centres=centres, **asdict(read))
            provenance = parse_provenance(metadata[HEADER], f"{path}: the header's {HEADER}")
            return cls(bases=bases, provenance=provenance, regions=regions)
        except ModelError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path} is damaged: {error}. {REBUILD}") from error


def _span(bases: Sequence[Tensor]) -> Tensor:
    """Return one basis for the span of several of the same width; of equal ones the first."""
    if all(torch.equal(basis, bases[0]) for basis in bases[1:]):
        return bases[0]
    directions, lengths, _ = torch.linalg.svd(torch.cat(list(bases), dim=1), full_matrices=False)
    return directions[:, lengths > DEPENDENT]
