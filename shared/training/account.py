"""What a training tells of its protection: in a log, in a report, in the saved file's header."""

from typing import Any

from .filter import MemorizationFilter
from .projection import Projection
from .settings import FilterSettings
from .subspace import ConceptSubspace


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
    subspace: ConceptSubspace, projection: Projection, residual: float | None
) -> dict[str, Any]:
    """Return how the subspace was made and what was kept out of it, plain data."""
    made = subspace.provenance
    return {key: made[key] for key in made if key != "templates"} | {
        "rank": subspace.rank,
        "width": subspace.width,
        "modules": len(projection.factors),
        "steps": projection.steps,
        "residual": residual,
    }


def filter_account(asked: FilterSettings, done: MemorizationFilter) -> dict[str, Any]:
    """Return what was asked of the filter and what it saw, plain data."""
    return {
        "threshold": str(asked.limit) if asked.quantile is None else f"q{asked.quantile}",
        "action": done.action,
        "unit": done.unit,
        "seen": done.seen,
        "flagged": done.flagged,
    }
