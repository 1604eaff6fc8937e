"""An extra forward pass that leaves no trace in a training, and sees the same random numbers."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """Where every generator a network may draw from stands."""

    cpu: torch.Tensor
    device: torch.Tensor | None
    """Of the accelerator, None on the CPU."""
    kind: str
    """"cuda" and the like, or "cpu"."""
    python: tuple
    numpy: dict

    @classmethod
    def now(cls, device: torch.device | str = "cpu") -> "RandomState":
        """Return the present state; of the accelerator, that of its current device."""
        kind = torch.device(device).type
        module = None if kind == "cpu" else getattr(torch, kind)
        return cls(
            cpu=torch.get_rng_state(),
            device=None if module is None else module.get_rng_state(),
            kind=kind,
            python=random.getstate(),
            numpy=np.random.get_state(legacy=False),  # noqa: NPY002 (the one trainers draw from)
        )

    def is_past(self) -> bool:
        """Return whether torch has drawn random numbers since, as dropout does."""
        present = RandomState.now(self.kind)
        moved = not torch.equal(self.cpu, present.cpu)
        return moved or (self.device is not None and not torch.equal(self.device, present.device))

    def restore(self) -> None:
        """Set every generator back to this state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            getattr(torch, self.kind).set_rng_state(self.device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002


@contextmanager
def aside(state: RandomState) -> Iterator[None]:
    """Run a block without gradient from `state` on, and continue as if it had not run.

    Args:
        state: Taken before the training's own forward pass, so that dropout draws the same masks
            in both and their difference is the text alone.
    """
    present = RandomState.now(state.kind)
    # Older releases of torch keep weights that autocast converts: those made here stop gradients.
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        state.restore()
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        present.restore()
