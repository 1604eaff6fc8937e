"""Detect Memorization: scores of diffusers, verdicts from a calibration, lists of prompts."""

import pytest
from comfyui import newest, node, pack
from demo_side import caption, denoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect

pytestmark = pytest.mark.comfy
PROMPTS = [caption("held_out"), caption()]
DEMO = {
    "demo": node("UnmemorizeLoadDemoModel"),
    "empty": node("CLIPTextEncode", clip=["demo", 1], text=""),
    "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
}
MODEL = {"model": ["demo", 0], "latent": ["latent", 0], "seeds": 4, "steps": 1}


def text(prompt: str) -> dict:
    return node("CLIPTextEncode", clip=["demo", 1], text=prompt)


def detector(positive: list, **inputs) -> dict:
    return node("UnmemorizeDetect", positive=positive, negative=["empty", 0], **MODEL | inputs)


OUTPUTS = {
    name: ["detect", i] for i, name in enumerate(["report", "score", "per_element", "p", "flag"])
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_scores_are_those_of_diffusers(comfy, prompt):
    expected = detect(denoiser(), [prompt], DetectionConfig())
    graph = DEMO | {"text": text(prompt), "detect": detector(["text", 0])}
    run = comfy.run(graph, keep=OUTPUTS)
    assert run["score"] == pytest.approx(expected.scores.item(), rel=1e-4)
    assert run["per_element"] == pytest.approx(expected.scores_per_element.item(), rel=1e-4)
    assert "calibration" in run["report"]
    assert run["flag"] is False
    assert run["p"] != run["p"]


CONTROLS = "\n".join(
    f"a {color} {thing}" for color in ("red", "blue") for thing in
    ("cat", "house", "tree", "boat", "cup", "hat", "road", "dog", "bird", "bed")
)  # fmt: skip


def calibrator(**inputs) -> dict:
    return node("UnmemorizeCalibrate", **MODEL | {
        "clip": ["demo", 1], "name": "demo", "controls": "art", "prompts": CONTROLS,
        "false_positive_rate": 0.05} | inputs)  # fmt: skip


def test_verdict_from_a_calibration_that_was_saved(comfy):
    graph = DEMO | {"calibrate": calibrator()}
    run = comfy.run(graph, keep={"report": ["calibrate", 1]})
    assert "20 controls" in run["report"]
    graph = DEMO | {
        "load": node("UnmemorizeLoadCalibration", name="demo.json"),
        "text": text(caption()),
        "detect": detector(["text", 0], calibration=["load", 0]),
    }
    run = comfy.run(graph, keep=OUTPUTS)
    assert run["flag"] is True
    assert run["p"] == pytest.approx(1 / 21)
    graph["detect"] = detector(["text", 0], calibration=["load", 0], seeds=3)
    refused = comfy.run(graph, keep=OUTPUTS, check=False)
    assert "seeds: calibrated [0, 1, 2, 3], now [0, 1, 2]" in refused.error
    graph["detect"] = detector(["text", 0], calibration=["load", 0], seeds=3, force=True)
    assert "other conditions" in comfy.run(graph, keep=OUTPUTS)["report"]


def detected_list(prompts: list) -> list:
    """Return the outputs for a list of conditionings, the second of which has an area."""
    import torch

    with torch.inference_mode():
        model, clip, _ = pack("nodes.engine.demo_model").load_model()
        encode = pack("nodes.engine.measuring").encoded
        positive = [encode(clip, prompt) for prompt in prompts]
        positive[1] = [[positive[1][0][0], positive[1][0][1] | {"area": (8, 8, 4, 4)}]]
        result = pack("nodes.detect").DetectMemorization.execute(
            model=[model], positive=positive, negative=[encode(clip, "")], seeds=[2], steps=[1],
            latent=[{"samples": torch.zeros(1, 4, 16, 16)}],
        )  # fmt: skip
        return list(result.result)


@newest
def test_a_list_of_prompts_gives_lists_in_its_order(comfy):
    prompts = [caption("held_out"), caption("learnt"), caption()]
    report, scores, per_element, p_values, flags = comfy.call(detected_list, prompts)
    expected = detect(denoiser(), prompts, DetectionConfig(seeds=(0, 1))).scores.tolist()
    assert scores[::2] == pytest.approx(expected[::2], rel=1e-4)
    assert scores[1] != pytest.approx(expected[1], rel=1e-2)  # its area counts
    assert len(per_element) == len(p_values) == len(flags) == 3
    first = max(range(3), key=lambda i: scores[i])
    assert report.startswith(f"prompt {first + 1}: score {scores[first]:.4g}")
