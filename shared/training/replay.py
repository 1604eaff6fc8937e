"""An extra forward pass that draws the same random numbers and leaves no trace in a training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """State of every generator that a network may draw from."""

    cpu: torch.Tensor
    accelerator: torch.Tensor | None
    """State of the accelerator's generator, None on the CPU."""
    device: torch.device
    """Whose accelerator's generator that is."""
    python: tuple
    numpy: dict

    @classmethod
    def now(cls, device: torch.device | str = "cpu") -> "RandomState":
        """Return the present state, of the accelerator that of one device."""
        device = torch.device(device)
        return cls(
            cpu=torch.get_rng_state(),
            accelerator=None
            if device.type == "cpu"
            else _module(device).get_rng_state(*_of(device)),
            device=device,
            python=random.getstate(),
            numpy=np.random.get_state(legacy=False),  # noqa: NPY002 (the one trainers draw from)
        )

    def is_past(self) -> bool:
        """Return whether torch has drawn random numbers since then, as dropout does."""
        present = RandomState.now(self.device)
        if self.accelerator is not None and not torch.equal(self.accelerator, present.accelerator):
            return True
        return not torch.equal(self.cpu, present.cpu)

    def restore(self) -> None:
        """Set every generator back to this state."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            _module(self.device).set_rng_state(self.accelerator, *_of(self.device))
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _of(device: torch.device) -> tuple[torch.device, ...]:
    """Return the argument that names a device: Apple's module knows one device and takes none."""
    return () if device.type == "mps" else (device,)


@contextmanager
def aside(state: RandomState) -> Iterator[None]:
    """Run a block without gradient from `state` on, and continue as if it had not run.

    Args:
        state: Taken before the training's own forward pass, so that dropout draws the same masks
            in both and their difference is the text alone.
    """
    present = RandomState.now(state.device)
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
