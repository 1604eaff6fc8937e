"""The harness itself: ComfyUI loads the checkout, runs graphs, and its failures are seen."""

import numpy as np
import pytest
from comfyui import newest, node, pack

pytestmark = pytest.mark.comfy
EMPTY = {"1": node("EmptyLatentImage", width=64, height=32, batch_size=2)}


def version_inside() -> str:
    from comfyui_version import __version__

    return __version__


def name_of_pack() -> str:
    return pack("shared.score.metrics").__name__


def test_every_version_is_what_it_says(comfy):
    assert comfy.call(version_inside) == comfy.version
    assert comfy.call(name_of_pack).endswith("Unmemorize-main.shared.score.metrics")


@newest
def test_values_come_back_and_the_cache_is_comfyuis(comfy):
    first = comfy.run(EMPTY, keep={"latent": ["1", 0]})
    np.testing.assert_array_equal(first["latent"]["samples"], np.zeros((2, 4, 4, 8)))
    assert first.ran == ["1"]
    assert comfy.run(EMPTY, keep={"latent": ["1", 0]}).ran == []
    assert comfy.run(EMPTY, keep={"latent": ["1", 0]}, fresh=True).ran == ["1"]


@newest
def test_failures_are_seen(comfy):
    with pytest.raises(AssertionError, match="EmptyLatentImage"):
        comfy.run({"1": node("EmptyLatentImage", width=1)}, keep={"latent": ["1", 0]})
    broken = {"1": node("LoadImage", image="absent.png")}
    assert comfy.run(broken, keep={"image": ["1", 0]}, check=False).error
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        comfy.call(fail)


def fail() -> float:
    return 1 / 0
