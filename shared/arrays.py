"""Tensors: shapes in annotations, checked in tests at no cost to users, and rows of a batch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from typing import Annotated as Float  # a type checker reads the tensor and skips the shape
else:
    try:
        from jaxtyping import Float
    except ImportError:  # users of the node pack do not need jaxtyping

        class Float:
            """Stand-in: `Float[Tensor, "..."]` is the plain tensor type."""

            def __class_getitem__(cls, item: tuple) -> type:
                """Return the array type of the annotation."""
                return item[0]


__all__ = ["Float", "Tensor", "normal_view", "take_rows", "widened"]

UNBATCHED = ("img_ids", "txt_ids")
"""Arguments of Flux that are one for all rows, whatever their own length."""


def widened(x: Tensor) -> Tensor:
    """Return `x` in float32 where it has half precision, else `x` itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def take_rows(value: Any, rows: Tensor | Sequence[int], batch: int) -> Any:
    """Return arguments of a network with only some rows of their tensors.

    Args:
        value: A tensor, or mappings, lists and tuples of them; anything else stays as it is.
        rows: Indices of the rows.
        batch: Length of the tensors that have a row per row of the batch; others stay as they are.
    """
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != batch:
            return value
        return value[torch.as_tensor(rows, dtype=torch.long, device=value.device)]
    if isinstance(value, Mapping):
        return {
            name: inner if name in UNBATCHED else take_rows(inner, rows, batch)
            for name, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)([take_rows(inner, rows, batch) for inner in value])
    return value


def normal_view(tensor: Tensor) -> Tensor:
    """Return a normal tensor over the memory of an inference tensor, a parameter if that was one.

    Detaching or wrapping would give an inference tensor again. A quantized tensor is made of the
    views of its parts: its own memory says nothing. Call it outside of inference mode.
    """
    if type(tensor) in (Tensor, torch.nn.Parameter):
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    elif is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        parts = {name: normal_view(getattr(tensor, name)) for name in names}
        shape = tensor.size(), tensor.stride()
        view = type(tensor).__tensor_unflatten__(parts, context, *shape)
    else:
        view = tensor.clone()  # of a class that does not say what it is made of
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(view, requires_grad=False)
    return view
