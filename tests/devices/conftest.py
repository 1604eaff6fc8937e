"""Stand-ins for GPUs: a foreign device, and a `torch.cuda` that says what it was asked."""

from types import SimpleNamespace

import pytest
import torch
from foreign import ForeignDevice

GPU = "cuda:1"
"""Not the current one, which is 0: what asks for "the" GPU asks for the wrong one."""


class Inference(torch.no_grad):
    """`inference_mode` without its tensors, which a stand-in cannot be."""

    def __new__(cls, mode=True):
        return super().__new__(cls)

    def __init__(self, mode: bool = True):
        super().__init__()


@pytest.fixture
def cuda(monkeypatch):
    """A `torch.cuda` of two GPUs; `asked` holds the name and device of each question."""
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
    answer("get_device_name", "a GPU")
    monkeypatch.setattr(torch.cuda, "set_rng_state",
                        lambda state, device=None: asked.append(("set_rng_state", device)))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return SimpleNamespace(asked=asked, of=lambda name: [d for n, d in asked if n == name])


@pytest.fixture
def foreign(cuda, monkeypatch):
    """A second device that computes; see `ForeignDevice`."""
    enter, leave = torch.inference_mode.__enter__, torch.inference_mode.__exit__
    del enter, leave
    blocks = []

    def begin(self):
        blocks.append(torch.no_grad())
        blocks[-1].__enter__()

    # Stand-ins cannot be inference tensors.
    monkeypatch.setattr(torch.inference_mode, "__enter__", begin)
    monkeypatch.setattr(torch.inference_mode, "__exit__", lambda self, *error: blocks.pop().__exit__(*error))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with ForeignDevice() as device:
        yield device
    torch.__future__.set_overwrite_module_params_on_conversion(before)
