"""Every way of mitigating while sampling, the published ones among them, behind one interface."""

from dataclasses import MISSING, fields
from typing import Any

from .attention import AttractionRepulsion
from .delayed_guidance import DelayedGuidance
from .embedding import EmbeddingOptimisation
from .initial_noise import InitialNoise
from .method import Method
from .neighbour import NearestNeighbour
from .ordinary import OrdinaryEmbedding
from .random_words import RandomInsertion
from .reword import Reword

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Reword,
        OrdinaryEmbedding,
        EmbeddingOptimisation,
        DelayedGuidance,
        InitialNoise,
        AttractionRepulsion,
        NearestNeighbour,
        RandomInsertion,
    )
}
"""By the name that users give."""
DEFAULT = Reword.name
"""What acts where nobody chose."""


def make_method(name: str, **settings: Any) -> Method:
    """Return a method by name.

    Args:
        name: One of `METHODS`.
        **settings: Fields of its class.

    Raises:
        ValueError: There is no such method or setting, one is missing, or a value makes no sense.
    """
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}; choose one of {', '.join(METHODS)}.")
    method: Any = METHODS[name]  # each of them is a dataclass
    known = {field.name: field for field in fields(method)}
    if unknown := sorted(settings.keys() - known.keys()):
        raise ValueError(
            f"Method {name!r} has no setting {', '.join(unknown)}; it has {', '.join(known)}."
        )
    needed = {name for name, field in known.items() if field.default is MISSING}
    if missing := sorted(needed - settings.keys()):
        raise ValueError(f"Method {name!r} needs {', '.join(missing)}.")
    return method(**settings)
