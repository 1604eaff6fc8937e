"""Unmemorize: acts on memorized prompts alone, as far as the slider says, and shows what it did."""

import numpy as np
import pytest
from comfyui import newest, node
from demo_side import caption

pytestmark = pytest.mark.comfy
DEMO = {
    "demo": node("UnmemorizeLoadDemoModel"),
    "latent": node("EmptyLatentImage", width=128, height=128, batch_size=2),
}
OUTPUTS = {"positive": ["done", 1], "report": ["done", 2], "acted": ["done", 3],
           "shown": ["done", 4]}  # fmt: skip


def graph(prompt: str, **inputs) -> dict:
    settings = {"model": ["demo", 0], "positive": ["text", 0], "latent": ["latent", 0],
                "strength": 1.0, "show_me": False}  # fmt: skip
    return DEMO | {
        "text": node("CLIPTextEncode", clip=["demo", 1], text=prompt),
        "done": node("UnmemorizePrompt", **settings | inputs),
    }


def score(report: str) -> tuple[float, float]:
    """Return the scores before and after."""
    words = report.splitlines()[0].split()
    at = words.index("score")
    return float(words[at + 1]), float(words[at + 3].rstrip(","))


@newest
def test_a_memorized_prompt_is_changed_and_no_other(comfy):
    run = comfy.run(graph(caption(), show_me=True, vae=["demo", 2]), keep=OUTPUTS, fresh=True)
    before, after = score(run["report"])
    assert run["acted"] is True
    assert after < before / 2
    assert run["report"].startswith("Changed: ")
    assert run["shown"].shape == (2, 128, 128, 3)
    assert np.abs(run["shown"][0] - run["shown"][1]).mean() > 0.02

    half = comfy.run(graph(caption(), strength=0.5), keep=OUTPUTS)
    assert after < score(half["report"])[1] < before

    kept = {**OUTPUTS, "text": ["text", 0]}
    for settings in (graph(caption("template"), strength=0.0), graph(caption("held_out"))):
        other = comfy.run(settings, keep=kept)
        assert other["acted"] is False
        assert other["report"].startswith("Not changed")
        assert np.array_equal(other["positive"][0][0], other["text"][0][0])

    refused = comfy.run(graph(caption(), show_me=True), check=False)
    assert "connect the model's VAE" in refused.error
