"""An extra forward pass that draws the same random numbers and leaves no trace in a training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """State of every generator that a network may draw from."""

    cpu: torch.Tensor
    accelerator: torch.Tensor | None
    """State of the accelerator's generator, None on the CPU."""
    device_type: str
    """"cuda" and the like, or "cpu"."""
    python: tuple
    numpy: dict

    @classmethod
    def now(cls, device: torch.device | str = "cpu") -> "RandomState":
        """Return the present state; the accelerator's is that of its current device."""
        device_type = torch.device(device).type
        module = None if device_type == "cpu" else getattr(torch, device_type)
        return cls(
            cpu=torch.get_rng_state(),
            accelerator=None if module is None else module.get_rng_state(),
            device_type=device_type,
            python=random.getstate(),
            numpy=np.random.get_state(legacy=False),  # noqa: NPY002 (the one trainers draw from)
        )

    def is_past(self) -> bool:
        """Return whether torch has drawn random numbers since then, as dropout does."""
        present = RandomState.now(self.device_type)
        if self.accelerator is not None and not torch.equal(self.accelerator, present.accelerator):
            return True
        return not torch.equal(self.cpu, present.cpu)

    def restore(self) -> None:
        """Set every generator back to this state."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            getattr(torch, self.device_type).set_rng_state(self.accelerator)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002


@contextmanager
def aside(state: RandomState) -> Iterator[None]:
    """Run a block without gradient from `state` on, and continue as if it had not run.

    Args:
        state: Taken before the training's own forward pass, so that dropout draws the same masks
            in both and their difference is the text alone.
    """
    present = RandomState.now(state.device_type)
    # Autocast of older torch caches converted weights: those made without gradient would stop it.
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        state.restore()
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        present.restore()
