"""Stand-ins for GPUs: a second device that computes, and a `torch.cuda` that remembers questions.

The tests here need no GPU. What they cannot show is how fast one is, and what its kernels round:
`make gpu-check` does.
"""

from types import SimpleNamespace

import pytest
import torch
from foreign import ForeignDevice


@pytest.fixture
def cuda(monkeypatch):
    """A `torch.cuda` of two GPUs; `of(name)` are the devices that a function was asked about."""
    asked: list[tuple[str, object]] = []

    def answer(name, value):
        def ask(device=None):
            asked.append((name, device))
            return value

        monkeypatch.setattr(torch.cuda, name, ask)

    answer("mem_get_info", (2**33, 2**34))
    answer("empty_cache", None)
    answer("get_rng_state", torch.arange(8, dtype=torch.uint8))
    answer("reset_peak_memory_stats", None)
    answer("max_memory_allocated", 3 * 2**30)

    def restore(state, device=None):
        asked.append(("set_rng_state", device))

    monkeypatch.setattr(torch.cuda, "set_rng_state", restore)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    return SimpleNamespace(asked=asked, of=lambda name: [d for n, d in asked if n == name])


@pytest.fixture
def foreign(cuda, monkeypatch):
    """Function that begins a `ForeignDevice`, which ends with the test."""
    blocks, devices = [], []

    def begin(self):
        blocks.append(torch.no_grad())
        blocks[-1].__enter__()

    # Stand-ins cannot be inference tensors, nor take a parameter's place in memory.
    monkeypatch.setattr(torch.inference_mode, "__enter__", begin)
    monkeypatch.setattr(
        torch.inference_mode, "__exit__", lambda self, *e: blocks.pop().__exit__(*e)
    )
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)

    def start(**settings):
        devices.append(ForeignDevice(**settings))
        return devices[-1].__enter__()

    yield start
    for device in reversed(devices):
        device.__exit__(None, None, None)
    torch.__future__.set_overwrite_module_params_on_conversion(before)
