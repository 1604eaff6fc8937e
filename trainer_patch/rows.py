"""Some rows of a batch, wherever they are among the arguments of a network."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

UNBATCHED = ("img_ids", "txt_ids")
"""Arguments of Flux that are one for all rows, whatever their own length."""


def take_rows(value: Any, places: Tensor, count: int) -> Any:
    """Return arguments with only some rows of their tensors.

    Args:
        value: A tensor, or mappings, lists and tuples of them; anything else stays as it is.
        places: Numbers of the rows, [row].
        count: Rows that a tensor of the whole batch has.
    """
    if isinstance(value, Tensor):
        return value[places.to(value.device)] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {
            key: each if key in UNBATCHED else take_rows(each, places, count)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)([take_rows(each, places, count) for each in value])
    return value
