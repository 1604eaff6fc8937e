"""What lies in a subspace taken out of many factors at once, where the factors lie."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ...arrays import Float, Tensor
from ..concept.subspace import remove
from .products import hadamard_basis, hadamard_columns


class Removal:
    """Takes from factors what lies in their subspaces.

    The bases of one input width are moved once to where its factors lie, each of them once, however
    many factors have it and whichever of the factors come in a step.
    """

    def __init__(self, bases: Mapping[str, Float[Tensor, "width rank"]]):
        """Take the bases, by the names of the factors, in float64 on the CPU."""
        self._distinct: dict[int, list[Tensor]] = {}
        self._place: dict[str, int] = {}
        for name, basis in bases.items():
            known = self._distinct.setdefault(len(basis), [])
            if not any(basis is other for other in known):
                known.append(basis)
            self._place[name] = next(i for i, other in enumerate(known) if basis is other)
        self._moved: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def outside(
        self, stack: Float[Tensor, "name row width"], names: Sequence[str]
    ) -> Float[Tensor, "name row width"]:
        """Return the factors outside of their subspaces, in the precision to compute in."""
        if stack.device.type == "cpu" or stack.dtype == torch.float64:
            # Exempt from autocast and TF32, which trainers switch on and which leave 1e-3.
            return remove(stack.double(), self._bases(stack, names, torch.float64))
        # Apple's GPUs have no float64, and those that people have at home a 64th of their speed.
        basis = self._bases(stack, names, torch.float32)
        with full_float32(stack.device):
            # Once leaves the rounding of what was inside; twice is enough (Kahan and Parlett).
            return remove(remove(stack.float(), basis), basis)

    def _bases(
        self, stack: Tensor, names: Sequence[str], dtype: torch.dtype
    ) -> Float[Tensor, "*name width rank"]:
        """Return the bases of some factors; where all have the same there is no axis of names."""
        width = stack.shape[-1]
        key = (width, stack.device, dtype)
        if key not in self._moved:
            self._moved[key] = _padded(self._distinct[width]).to(dtype).to(stack.device)
        places = [self._place[name] for name in names]
        return self._moved[key][places[0] if len(set(places)) == 1 else places]


def outside_columns(
    factor: Float[Tensor, "row width"],
    basis: Float[Tensor, "width rank"],
    partner: Float[Tensor, "other width"],
) -> Float[Tensor, "row width"]:
    """Return LoHa's W2b outside of what it must leave out beside W1b; see `products`.

    Args:
        factor: W2b, or its gradient.
        basis: Of the subspace, in float64 on the CPU.
        partner: W1b as it is now.
    """
    double = factor.device.type == "cpu" or factor.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    with full_float32(factor.device):
        columns = hadamard_columns(
            basis.to(dtype).to(factor.device), partner.detach().to(dtype).to(factor.device)
        )
        if not columns.numel():
            return factor
        own = hadamard_basis(columns)
        clear = remove(factor.to(dtype), own)
        return clear if double else remove(clear, own)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Keep autocast and TF32 away from the products of a block."""
    matmul = torch.backends.cuda.matmul
    # Newer versions refuse to read the old switch after anybody has used the new one.
    name, full = (
        ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    )
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(matmul, name, before)


def _padded(bases: Sequence[Tensor]) -> Float[Tensor, "basis width rank"]:
    """Return the bases side by side; the zeros behind the smaller ones remove nothing."""
    most = max(basis.shape[1] for basis in bases)
    return torch.stack([
        torch.nn.functional.pad(basis, (0, most - basis.shape[1])) for basis in bases
    ])  # fmt: skip
