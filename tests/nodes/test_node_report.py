"""The report finds the run of its latent, says what cannot be measured, and is saved on demand."""

import json
import math

import pytest
import torch
from comfyui import newest, node
from demo_side import denoiser
from PIL import Image
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import control_differences
from unmemorize.shared.score.pooled_basis import pooled
from watched_sampling import PROMPT, STEPS, TEXTS, WATCH, report, sample, sampler

pytestmark = pytest.mark.comfy


def test_the_report_finds_the_run_of_its_latent_under_the_cache(comfy):
    graph = TEXTS | WATCH | {
        "a": sampler(["watch", 0], seed=1),
        "b": sampler(["watch", 0], seed=2),
        "report a": report(["a", 0]),
        "report b": report(["b", 0]),
    }  # fmt: skip
    keep = {"a": ["report a", 3], "b": ["report b", 3], "text": ["report a", 2]}
    first = comfy.run(graph, keep=keep, fresh=True)
    assert first["a"] != first["b"]
    alone = sample(comfy, {"seed": 2}, options={})["traces"][0][0, 0]
    assert first["b"] == pytest.approx(alone, rel=1e-6)
    assert comfy.run(graph, keep=keep).ran == []

    graph["b"] = sampler(["watch", 0], seed=3)
    second = comfy.run(graph, keep=keep)
    assert {"b", "report b"} >= set(second.ran) - {"watch"}
    assert (second["a"], second["b"]) != (first["a"], first["b"])
    assert second["a"] == first["a"]
    graph["b"] = sampler(["watch", 0], seed=2)
    assert comfy.run(graph, keep=keep)["b"] == first["b"]
    assert "A verdict needs a calibration" in first["text"]
    assert first.ui["report a"]["images"]


def test_sampler_custom_advanced_and_basic_guider(comfy):
    custom = TEXTS | WATCH | {
        "noise": node("RandomNoise", noise_seed=1),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["1", 0], scheduler="normal", steps=STEPS,
                       denoise=1.0),
        "guider": node("CFGGuider", model=["watch", 0], positive=["2", 0], negative=["3", 0],
                       cfg=5.0),
        "a": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0],
                  sampler=["sampler", 0], sigmas=["sigmas", 0], latent_image=["4", 0]),
        "report": report(["a", 0]),
    }  # fmt: skip
    keep = {"score": ["report", 3], "text": ["report", 2], "memorized": ["report", 4]}
    expected = sample(comfy, options={})["traces"][0][0, 0]
    assert comfy.run(custom, keep=keep)["score"] == pytest.approx(expected, rel=1e-6)

    custom["guider"] = node("BasicGuider", model=["watch", 0], conditioning=["2", 0])
    silent = comfy.run(custom, keep=keep)
    assert "Not measurable in this run" in silent["text"]
    assert math.isnan(silent["score"])
    assert silent["memorized"] is False
    custom["watch"] = node("UnmemorizeWatch", model=["1", 0], measure_anyway=True)
    assert "Connect an encoded empty text" in comfy.run(custom, keep=keep)["text"]
    custom["watch"]["inputs"]["negative"] = ["3", 0]
    anyway = comfy.run(custom, keep=keep)
    assert anyway["score"] == pytest.approx(expected, rel=1e-5)
    assert f"{STEPS} additional passes" in anyway["text"]


CONTROLS = [
    f"a {color} {thing}" for color in ("red", "blue") for thing in
    ("cat", "house", "tree", "boat", "cup", "hat", "road", "dog", "bird", "bed")
]  # fmt: skip


def calibrator(**inputs) -> dict:
    return node("UnmemorizeCalibrate", **{
        "model": ["1", 0], "clip": ["1", 1], "latent": ["4", 0], "name": "images", "steps": 1,
        "controls": "art", "prompts": "\n".join(CONTROLS), "false_positive_rate": 0.05,
        "seeds": 2} | inputs)  # fmt: skip


def test_a_run_from_the_calibrated_level_is_judged_by_its_residual(comfy):
    """The two first steps of 50 of ddim_uniform, which begin where the controls were measured."""
    graph = TEXTS | WATCH | {
        "calibrate": calibrator(),
        "noise": node("RandomNoise", noise_seed=1),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "all": node("BasicScheduler", model=["1", 0], scheduler="ddim_uniform", steps=50,
                    denoise=1.0),
        "sigmas": node("SplitSigmas", sigmas=["all", 0], step=2),
        "guider": node("CFGGuider", model=["watch", 0], positive=["2", 0], negative=["3", 0],
                       cfg=5.0),
        "a": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0],
                  sampler=["sampler", 0], sigmas=["sigmas", 0], latent_image=["4", 0]),
        "report": report(["a", 0], calibration=["calibrate", 0]),
    }  # fmt: skip
    keep = {"score": ["report", 3], "text": ["report", 2], "memorized": ["report", 4],
            "made": ["calibrate", 1]}  # fmt: skip
    run = comfy.run(graph, keep=keep, fresh=True)
    assert "residual, threshold" in run["made"]
    assert "Score: residual" in run["text"]
    assert run["memorized"] is True

    def differences(prompts: list, seeds: tuple) -> torch.Tensor:
        return control_differences(
            denoiser(), prompts, DetectionConfig(seeds=seeds), [0] * len(seeds)
        )

    basis, scores = pooled(differences(CONTROLS, (0, 1)))
    expected = basis.residual(differences([PROMPT], (1,))[0], [0]).item()
    assert run["score"] == pytest.approx(expected, rel=0.02)  # noise at 13.1 has a sd of 13.1
    assert expected > scores.max()

    graph["guider"] = node("CFGGuider", model=["watch", 0], positive=["2", 0], negative=["2", 0],
                           cfg=5.0)  # fmt: skip
    other = comfy.run(graph, keep=keep)
    assert "Score: magnitude" in other["text"]
    assert other["text"].startswith("No verdict")
    assert "The negative prompt is another one" in other["text"]
    assert other["memorized"] is False
    graph["guider"]["inputs"]["negative"] = ["3", 0]
    graph["calibrate"] = calibrator(seeds=1, name="prompts alone")
    alone = comfy.run(graph, keep=keep)
    assert "two seeds or more" in alone["made"]
    assert "Run Calibrate again, with two seeds or more" in alone["text"]


@newest
def test_a_latent_of_another_sampler_is_refused(comfy):
    graph = TEXTS | WATCH | {
        "a": sampler(["watch", 0], seed=1),
        "b": sampler(["watch", 0], seed=2),
        "c": sampler(["1", 0], seed=3),
        "first": report(["a", 0]),
        "second": report(["b", 0]),
        "report": report(["c", 0]),
    }  # fmt: skip
    run = comfy.run(graph, keep={"text": ["report", 2]}, fresh=True)
    # Whether both runs are there already depends on ComfyUI's order; the third time they are.
    run = comfy.run(graph | {"report": report(["c", 0], steps=2)}, keep={"text": ["report", 2]})
    assert "not made by a sampler of the watched model" in run["text"]


def test_the_score_is_in_the_saved_image(comfy):
    graph = TEXTS | WATCH | {
        "a": sampler(["watch", 0]),
        "report": report(["a", 0], save_score=True),
        "decode": node("VAEDecode", samples=["report", 0], vae=["1", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="scored"),
    }  # fmt: skip
    extra = {"extra_pnginfo": {"workflow": {}}}
    run = comfy.run(graph, keep={"score": ["report", 3]}, extra=extra, fresh=True)
    name = run.ui["save"]["images"][0]["filename"]
    with Image.open(comfy.base / "output" / name) as image:
        told = json.loads(image.text["unmemorize"])["report"]
    assert told["score"] == [run["score"]]
    assert told["memorized"] == [None]
    again = comfy.run(graph, keep={"score": ["report", 3]}, extra={"extra_pnginfo": {}})
    assert "a" not in again.ran
    assert "report" in again.ran  # for the metadata of this prompt's images
