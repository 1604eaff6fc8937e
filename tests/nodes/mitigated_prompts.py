"""Prompts of the demo that a gate lets through and does not, and a calibration in a graph."""

from functools import cache

from comfyui import node
from demo_side import denoiser
from test_node_detect import DEMO, calibrator, text
from unmemorize import demo
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect

SAMPLING = {
    "seed": 0, "steps": 4, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal",
    "denoise": 1.0, "negative": ["empty", 0], "latent_image": ["latent", 0],
}  # fmt: skip


@cache
def memorized() -> str:
    """Return the prompt with the highest score of some that were learnt by heart."""
    return _ranked("verbatim", 8)[-1]


@cache
def ordinary() -> str:
    """Return the prompt with the lowest score of some that were held out.

    The calibration's controls are of another kind, so most captions of the demo are flagged by it.
    """
    return _ranked("held_out", 16)[0]


def _ranked(group: str, count: int) -> list[str]:
    texts = [caption.text for caption in demo.captions() if caption.group == group][:count]
    scores = detect(denoiser(), texts, DetectionConfig(seeds=(0,))).scores.tolist()
    return [text for _, text in sorted(zip(scores, texts, strict=True))]


def calibrated() -> dict:
    """Return a graph with the demo, both prompts and a calibration at seed 0."""
    return DEMO | {
        "memorized": text(memorized()),
        "ordinary": text(ordinary()),
        "calibrate": calibrator(seeds=1),
    }


def sampler(positive: list, model: list | None = None, **changes) -> dict:
    """Return a KSampler of the demo."""
    settings = SAMPLING | {"positive": positive, "model": model or ["demo", 0]} | changes
    return node("KSampler", **settings)
