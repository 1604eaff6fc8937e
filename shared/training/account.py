"""What a training tells of its protection: in a log, in a report, in the saved file's header."""

from collections.abc import Mapping
from typing import Any

from .concept.subspace import ConceptSubspace
from .filter.filter import MemorizationFilter
from .layers.subspaces import LayerSubspaces
from .projection.projection import Projection
from .settings import FilterSettings


def describe(subspace: ConceptSubspace) -> str:
    """Return size and acceptance of a subspace in one line."""
    made = subspace.provenance
    parts = [f"{subspace.rank} of {subspace.width} dimensions"]
    if "residuals" in made:
        missed = ", ".join(f"{residual:.1%}" for residual in made["residuals"])
        parts.append(f"missed of held-out sentences {missed}")
        parts.append(f"taken of other text {made['collateral']:.1%}")
        parts.append("accepted" if made["accepted"] else "NOT accepted, forced")
    return "; ".join(parts)


def projection_account(
    subspace: ConceptSubspace | None,
    layers: LayerSubspaces | None,
    projection: Projection,
    residual: float | None,
) -> dict[str, Any]:
    """Return how the subspaces were made and what was kept out of them, plain data."""
    told: dict[str, Any] = {}
    if subspace is not None:
        told |= _without(subspace.provenance, "templates")
        told |= {"rank": subspace.rank, "width": subspace.width}
    if layers is not None:
        told["layers"] = _without(layers.provenance, "inside") | {"count": len(layers.bases)}
    return told | {
        "modules": len(projection.factors),
        "steps": projection.steps,
        "residual": residual,
    }


def filter_account(asked: FilterSettings, done: MemorizationFilter) -> dict[str, Any]:
    """Return what was asked of the filter and what it saw, plain data."""
    return {
        "threshold": asked.text,
        "action": done.action,
        "unit": done.unit,
        "recall": asked.recall,
        "seen": done.seen,
        "measured": done.measured,
        "flagged": done.flagged,
    }


def _without(provenance: Mapping[str, Any], long: str) -> dict[str, Any]:
    """Return a provenance but for what is too long to be told with every file."""
    return {key: value for key, value in provenance.items() if key != long}
