"""Token Heatmap: the words, scores and gradients of diffusers, on every ComfyUI."""

import json

import pytest
from comfyui import node
from demo_side import caption, denoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect
from unmemorize.shared.words.explanation import explain

pytestmark = pytest.mark.comfy
PROMPT = caption()
DEMO = {
    "demo": node("UnmemorizeLoadDemoModel"),
    "empty": node("CLIPTextEncode", clip=["demo", 1], text=""),
    "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
}
OUTPUTS = {
    name: ["map", i] for i, name in enumerate(["image", "where", "report", "data", "edited"])
}


def heatmap(**inputs) -> dict:
    return DEMO | {"map": node("UnmemorizeTokenHeatmap", **{
        "model": ["demo", 0], "clip": ["demo", 1], "text": PROMPT, "negative": ["empty", 0],
        "latent": ["latent", 0], "seeds": 2, "steps": 1, "most": 2} | inputs)}  # fmt: skip


def test_every_word_is_left_out_as_by_diffusers(comfy):
    expected = explain(denoiser(), PROMPT, DetectionConfig(seeds=(0, 1)))
    run = comfy.run(heatmap(), keep=OUTPUTS)
    data = json.loads(run["data"])
    assert data["method"] == "leave_out"
    assert tuple(word["word"] for word in data["words"]) == expected.words
    found = [word["significance"] for word in data["words"]]
    assert found == pytest.approx(expected.significance, rel=1e-3, abs=1e-3)
    assert [one["prompt"] for one in data["left_out"]] == [o.prompt for o in expected.occlusions]
    after = [one["score_after"] for one in data["left_out"]]
    assert after == pytest.approx([o.score_after for o in expected.occlusions], rel=1e-4)
    assert data["edited"] is None
    assert run["edited"] == PROMPT
    assert run["image"].shape[2:] == (640, 3)
    assert run["where"].shape == (1, 128, 128)
    assert run["where"].min() >= 0
    assert run["where"].max() > 0.9


def test_the_published_gradient_is_that_of_diffusers(comfy):
    config = DetectionConfig(seeds=(0, 1))
    expected = explain(denoiser(), PROMPT, config, method="encoder_gradient", occlude=2)
    data = json.loads(comfy.run(heatmap(method="encoder_gradient"), keep=OUTPUTS)["data"])
    found = [word["significance"] for word in data["words"]]
    assert found == pytest.approx(expected.significance, rel=1e-3)
    assert [one["prompt"] for one in data["left_out"]] == [o.prompt for o in expected.occlusions]


def test_a_word_is_struck_and_one_replaced(comfy):
    words = PROMPT.split()
    first, last = words[0].strip(","), words[-1]
    edit = f"{first.upper()} -> thing\n\n{last}"
    run = comfy.run(heatmap(edit=edit), keep=OUTPUTS)
    edited = PROMPT.replace(first, "thing", 1)[: -len(last)].rstrip()
    assert run["edited"] == edited
    data = json.loads(run["data"])["edited"]
    config = DetectionConfig(seeds=(0, 1))
    before, after = detect(denoiser(), [PROMPT, edited], config).scores.tolist()
    assert data["prompt"] == edited
    assert data["score_before"] == pytest.approx(before, rel=1e-4)
    assert data["score_after"] == pytest.approx(after, rel=1e-4)
    said = f"Replace “{words[0]}” with “thing”, drop “{last}”: the magnitude changes from"
    assert run["report"].startswith(said)


def test_a_word_that_is_not_there_is_refused(comfy):
    done = comfy.run(heatmap(edit="zebra -> thing"), check=False)
    assert "No word of the prompt is 'zebra'" in done.error


def test_weights_leave_with_their_words(comfy):
    weighted = PROMPT.replace(PROMPT.split()[0], f"({PROMPT.split()[0]}:1.3)", 1)
    data = json.loads(comfy.run(heatmap(text=weighted), keep=OUTPUTS)["data"])
    assert data["words"][0]["weight"] == pytest.approx(1.3)
    without = next(one for one in data["left_out"] if one["index"] == 0)
    assert without["prompt"].split() == PROMPT.split()[1:]
    plain = json.loads(comfy.run(heatmap(), keep=OUTPUTS)["data"])
    same = next(one for one in plain["left_out"] if one["index"] == 0)
    assert without["score_after"] == pytest.approx(same["score_after"], rel=1e-3)
