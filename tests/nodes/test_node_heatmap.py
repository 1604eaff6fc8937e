"""Token Heatmap: the words and gradients of diffusers, on every ComfyUI."""

import json

import pytest
from comfyui import node
from demo_side import caption, denoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.words.explanation import explain

pytestmark = pytest.mark.comfy
PROMPT = caption()
DEMO = {
    "demo": node("UnmemorizeLoadDemoModel"),
    "empty": node("CLIPTextEncode", clip=["demo", 1], text=""),
    "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
}
OUTPUTS = {name: ["map", i] for i, name in enumerate(["image", "where", "report", "data"])}


def heatmap(**inputs) -> dict:
    return DEMO | {"map": node("UnmemorizeTokenHeatmap", **{
        "model": ["demo", 0], "clip": ["demo", 1], "text": PROMPT, "negative": ["empty", 0],
        "latent": ["latent", 0], "seeds": 2, "steps": 1, "most": 2} | inputs)}  # fmt: skip


def test_words_are_those_of_diffusers(comfy):
    expected = explain(denoiser(), PROMPT, DetectionConfig(seeds=(0, 1)), occlude=2)
    run = comfy.run(heatmap(), keep=OUTPUTS)
    data = json.loads(run["data"])
    assert tuple(word["word"] for word in data["words"]) == expected.words
    found = [word["significance"] for word in data["words"]]
    assert found == pytest.approx(expected.significance, rel=1e-3)
    assert [one["prompt"] for one in data["left_out"]] == [o.prompt for o in expected.occlusions]
    after = [one["score_after"] for one in data["left_out"]]
    assert after == pytest.approx([o.score_after for o in expected.occlusions], rel=1e-4)
    assert run["image"].shape[2:] == (640, 3)
    assert run["where"].shape == (1, 128, 128)
    assert run["where"].min() >= 0
    assert run["where"].max() > 0.9
