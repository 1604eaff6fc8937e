"""The baseline: the whole LoRA weaker, as users do with its slider."""

from .case import Case, Path


def strength(case: Case) -> Path:
    """Return the LoRA multiplied by what is left."""
    original = case.weights.original
    return lambda left: {place: left * factor for place, factor in original.items()}
