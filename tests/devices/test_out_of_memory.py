"""Memory is freed after the failed pass is gone, whose tensors it is to make room for."""

import gc
import weakref

import pytest
import torch
from toy import ToyDenoiser
from unmemorize.audit.common import measure
from unmemorize.shared.score import collapse
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect


@pytest.fixture
def failed(monkeypatch):
    """References to the passes that ran out of memory, and whether each was alive at freeing."""
    passes, alive, denoise = [], [], ToyDenoiser.denoise

    def limited(self, x, sigma, cond):
        activations = x * 1
        if len(x) > 3:
            passes.append(weakref.ref(activations))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return denoise(self, x, sigma, cond)

    monkeypatch.setattr(ToyDenoiser, "denoise", limited)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(passes[-1]() is not None))
    gc.disable()  # the collector may come too late
    yield alive
    gc.enable()


def test_detection_goes_on_with_what_fits(failed):
    texts = [f"prompt number {i}" for i in range(5)]
    detect(ToyDenoiser(), texts, DetectionConfig(seeds=(0, 1), batch_size=8))
    assert failed
    assert not any(failed)


def test_quick_images_go_on_with_what_fits(failed, monkeypatch):
    monkeypatch.setattr(collapse, "STEPS", 2)
    found = measure._collapses(ToyDenoiser(), ["one prompt", "another", "a third"])
    assert len(found) == 3
    assert failed
    assert not any(failed)
