"""Shape annotations that are checked in tests and cost users nothing."""

from torch import Tensor

try:
    from jaxtyping import Float
except ImportError:  # users of the node pack do not need jaxtyping

    class Float:
        """Stand-in: `Float[Tensor, "..."]` is the plain tensor type."""

        def __class_getitem__(cls, item: tuple) -> type:
            """Return the array type of the annotation."""
            return item[0]


__all__ = ["Float", "Tensor"]
