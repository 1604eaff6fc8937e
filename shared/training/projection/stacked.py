"""Many small projections in few products: launches, not arithmetic, are what they cost."""

from collections.abc import Mapping, Sequence

import torch

from ...arrays import Float, Tensor
from ..concept.subspace import remove

BLOCK = 2**22
"""Most elements of one product: its copies in float64 take 100 MB."""
Key = tuple[int, int, torch.device, torch.dtype]
"""Width, rows of each factor, where, in what."""


class Stacked:
    """Projects tensors that are known by name, each outside its own basis."""

    def __init__(self, bases: Mapping[str, Tensor]):
        """Take the bases.

        Args:
            bases: By name [width rank]; where several names share one object, so do they a product.
        """
        self._bases = bases
        self._moved: dict[tuple, Tensor] = {}

    def project(self, tensors: Mapping[str, Tensor]) -> None:
        """Project tensors [rank width *kernel] along axis 1, in place.

        A basis of rank 0 leaves its tensor as it is, bit for bit.
        """
        stacks: dict[Key, list[str]] = {}
        for name, tensor in tensors.items():
            if self._bases[name].shape[1]:
                width = tensor.shape[1]
                key = (width, tensor.numel() // width, tensor.device, tensor.dtype)
                stacks.setdefault(key, []).append(name)
        for (width, rows, device, dtype), names in stacks.items():
            most = max(1, BLOCK // (width * rows))
            for start in range(0, len(names), most):
                some = names[start : start + most]
                views = [tensors[name].movedim(1, -1) for name in some]
                stack = torch.stack([view.reshape(rows, width) for view in views])
                clear = self._outside(stack, some, device).to(dtype).unbind()
                shaped = [part.view(v.shape) for part, v in zip(clear, views, strict=True)]
                torch._foreach_copy_(views, shaped)

    def _outside(
        self, stack: Float[Tensor, "name row width"], names: Sequence[str], device: torch.device
    ) -> Float[Tensor, "name row width"]:
        """Return the stack projected, in the precision to compute in."""
        # Trainers switch on TF32 and autocast, which would leave 1e-3; float64 is exempt from
        # both. Apple's GPUs have neither.
        wide = torch.float32 if device.type == "mps" else torch.float64
        key = (tuple(names), device)
        if key not in self._moved:
            bases = [self._bases[name] for name in names]
            if all(basis is bases[0] for basis in bases):
                self._moved[key] = bases[0].to(device, wide)
            else:
                self._moved[key] = _padded(bases).to(device, wide)
        return remove(stack.to(wide), self._moved[key])


def _padded(bases: Sequence[Tensor]) -> Float[Tensor, "name width rank"]:
    """Return the bases side by side; the zeros behind the smaller ones remove nothing."""
    most = max(basis.shape[1] for basis in bases)
    return torch.stack([
        torch.nn.functional.pad(basis, (0, most - basis.shape[1])) for basis in bases
    ])  # fmt: skip
