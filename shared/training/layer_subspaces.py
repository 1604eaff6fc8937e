"""Subspaces of single layers, by the layer's name: a value, and its file."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arrays import Tensor
from ..storage import replace_atomically
from ..weights import ModelError, check_finite, name_some, read_header
from .subspace import ConceptSubspace, provenance_in

HEADER = "unmemorize.layers"
"""Where a file keeps the provenance, as JSON."""
PREFIXES = re.compile(r"^(base_model\.model\.|unet\.|transformer\.|lora_unet_|lora_transformer_)+")


@dataclass(frozen=True, kw_only=True)
class LayerSubspaces:
    """What each layer must not read of its own input."""

    bases: Mapping[str, Tensor]
    """By layer [width rank], orthonormal columns, float64 on the CPU; rank 0 forbids nothing."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How they were made: plain data, kept with the file."""

    def __post_init__(self):
        for name, basis in self.bases.items():
            try:
                ConceptSubspace(basis=basis)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the bases by these names of the layers, in whatever dialect they are.

        A network, its LoRA and the saved file put different words before the same name.

        Raises:
            ValueError: One of the layers is not among the names.
        """
        known = {_core(name): name for name in names}
        if missing := [name for name in self.bases if _core(name) not in known]:
            raise ValueError(f"{len(missing)} layers are not there: {name_some(missing, 3)}.")
        return {known[_core(name)]: basis for name, basis in self.bases.items()}

    def save(self, path: Path) -> None:
        """Write a safetensors file with the provenance in its header, whole or not at all."""
        from safetensors.torch import save_file

        header = {HEADER: json.dumps(dict(self.provenance), sort_keys=True)}
        with replace_atomically(path) as part:
            save_file({n: b.contiguous() for n, b in self.bases.items()}, part, metadata=header)

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
            bases = {key: file.get_tensor(key) for key in file.keys()}
        check_finite(bases, str(path))
        try:
            return cls(bases=bases, provenance=provenance_in(header))
        except ValueError as error:
            raise ModelError(f"{path} is damaged: {error}") from error


def _core(name: str) -> str:
    """Return a layer's name without what trainers put before it or between its parts."""
    return PREFIXES.sub("", name).replace(".processor", "").replace(".", "_")
