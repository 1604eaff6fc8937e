"""Memorization Switch: only what leads to the chosen latent runs."""

import pytest
from comfyui import node

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("memorized", [True, False])
def test_the_other_latent_is_not_made(comfy, memorized):
    graph = {
        "ordinary": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "mitigated": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        "switch": node("UnmemorizeSwitch", memorized=memorized, ordinary=["ordinary", 0],
                       mitigated=["mitigated", 0]),
    }  # fmt: skip
    run = comfy.run(graph, keep={"latent": ["switch", 0]}, fresh=True)
    assert len(run["latent"]["samples"]) == (2 if memorized else 1)
    assert set(run.ran) == {"switch", "mitigated" if memorized else "ordinary"}
