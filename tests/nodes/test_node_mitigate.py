"""Mitigate Memorization: the search of `shared`, behind a gate that changes nothing when shut."""

import numpy as np
import pytest
import torch
from comfyui import newest, node, pack
from demo_side import denoiser
from mitigated_prompts import calibrated, memorized, sampler
from test_cancel import demo
from unmemorize.shared.mitigation.embedding import EmbeddingOptimisation
from unmemorize.shared.mitigation.method import Start
from unmemorize.shared.score.calibration import Calibration

pytestmark = pytest.mark.comfy
WIDGETS = {
    "seed": 0, "gate": "auto", "target_from": "calibration", "target_quantile": 0.5,
    "target_norm": 3.0, "learning_rate": 0.05, "iterations": 10,
}  # fmt: skip
OUTPUTS = ["positive", "report", "acted", "before", "after"]


def mitigate(positive: str, **changes) -> dict:
    links = {"model": ["demo", 0], "positive": [positive, 0], "negative": ["empty", 0]}
    further = {"latent": ["latent", 0], "calibration": ["calibrate", 0]}
    return node("UnmemorizeMitigate", **links | further | WIDGETS | changes)


def test_only_what_the_gate_lets_through_is_changed_and_falls_to_the_target(comfy):
    graph = calibrated()
    for name in ("memorized", "ordinary"):
        graph[f"mitigate {name}"] = mitigate(name, iterations=100)
        graph[f"plain {name}"] = sampler([name, 0])
        graph[f"mitigated {name}"] = sampler([f"mitigate {name}", 0])
    graph["detect"] = node(
        "UnmemorizeDetect", model=["demo", 0], positive=["mitigate memorized", 0],
        negative=["empty", 0], latent=["latent", 0], seeds=1, steps=1,
    )  # fmt: skip
    graph["judged"] = graph["detect"] | {
        "inputs": graph["detect"]["inputs"] | {"calibration": ["calibrate", 0]}
    }
    keep = {f"{part} {name}": [f"{part} {name}", 0] for name in ("memorized", "ordinary")
            for part in ("plain", "mitigated")}  # fmt: skip
    keep |= {output: ["mitigate memorized", i] for i, output in enumerate(OUTPUTS)}
    keep |= {"shut": ["mitigate ordinary", 2], "magnitude": ["detect", 1]}
    keep |= {"score": ["judged", 1], "flag": ["judged", 4]}
    run = comfy.run(graph, keep=keep)

    assert run["shut"] is False
    shut = (run[f"{part} ordinary"]["samples"] for part in ("plain", "mitigated"))
    np.testing.assert_array_equal(*shut)

    assert run["acted"] is True
    calibration = Calibration.load(comfy.base / "models" / "unmemorize" / "demo.json")
    assert run["before"] > calibration.threshold
    assert run["after"] <= calibration.seed_scores.median()
    assert run["magnitude"] == pytest.approx(run["after"], rel=1e-4)  # as Detect finds afterwards
    assert f"scores {run['score']:.4g} at the gate's own noises" in run["report"]
    assert ("still above the threshold" in run["report"]) == run["flag"]
    assert run["report"].startswith("Changed the embedding: the prompt scores")
    changed = (run[f"{part} memorized"]["samples"] for part in ("plain", "mitigated"))
    assert np.abs(np.subtract(*changed)).max() > 0.1


def test_by_residual_the_score_falls_and_the_rest_stays(comfy):
    graph = calibrated()
    changes = {"target_from": "residual", "learning_rate": 0.1, "iterations": 20}
    for name in ("memorized", "ordinary"):
        graph[f"mitigate {name}"] = mitigate(name, **changes)
    keep = {output: ["mitigate memorized", i] for i, output in enumerate(OUTPUTS)}
    run = comfy.run(graph, keep=keep | {"shut": ["mitigate ordinary", 2]})
    assert run["shut"] is False
    assert run["acted"] is True
    judge = Calibration.load(comfy.base / "models" / "unmemorize" / "demo.json").judge
    assert run["after"] < judge.threshold < run["before"]
    assert run["report"].startswith("Changed the embedding in ")
    assert f"scores {run['after']:.4g} at the gate's own noises" in run["report"]


def executed(kind: str, batch: int, prompt: str, changes: dict) -> dict:
    """Run the node on the demo or a toy network; return its outputs and what it left alone."""
    from tiny_networks import tiny_conditioning, tiny_model

    with torch.inference_mode():
        if kind == "demo":
            model, clip, _ = pack("nodes.engine.demo_model").load_model()
            positive, negative = (
                clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (prompt, "")
            )
        else:
            model = tiny_model(kind)
            positive, negative = tiny_conditioning(kind, 1), tiny_conditioning(kind, 2)
            positive += tiny_conditioning(kind, 3)
        mask = torch.ones(1, 8, 8)
        positive[0][1]["mask"] = mask
        before = {key: value.clone() for key, value in model.model.state_dict().items()}
        embeddings = positive[0][0].clone()
        result = (
            pack("nodes.mitigate")
            .MitigateMemorization.execute(
                model=model, positive=positive, negative=negative,
                latent={"samples": torch.zeros(batch, 4, 16, 16)},
                **WIDGETS | {"gate": "always", "target_from": "norm"} | changes,
            ).result
        )  # fmt: skip
        after = model.model.state_dict(keep_vars=True)
    return dict(zip(OUTPUTS, result, strict=True)) | {
        "embeddings": result[0][0][0],
        "same": result[0] is positive,
        "further": all(new[1] is old[1] for new, old in zip(result[0], positive, strict=True)),
        "others": all(new is old for new, old in zip(result[0][1:], positive[1:], strict=True)),
        "input": torch.equal(positive[0][0], embeddings),
        "weights": all(torch.equal(before[key], after[key]) for key in before),
        "inference": all(weight.is_inference() for weight in after.values()),
    }


def test_the_embedding_is_that_of_shared_through_diffusers(comfy):
    theirs = denoiser()
    cond, sigma = theirs.encode([memorized()]), theirs.sigmas(50)[0]
    x = theirs.initial_noise([0], sigma)
    with torch.no_grad():
        x0_uncond = theirs.denoise(x, sigma, theirs.unconditional())
    start = Start(
        denoiser=theirs, cond=cond, x=x, sigma=sigma, x0_uncond=x0_uncond,
        generator=torch.Generator(),
    )  # fmt: skip
    expected = EmbeddingOptimisation(target=0.0, iterations=3).start(start)
    changes = {"target_norm": 0.0, "iterations": 3}
    found = comfy.call(executed, "demo", 1, memorized(), changes)
    assert found["before"] == pytest.approx(expected.before.item(), rel=1e-4)
    assert found["after"] == pytest.approx(expected.after.item(), rel=1e-3)
    moved = expected.cond.embeddings - cond.embeddings
    difference = torch.from_numpy(found["embeddings"]) - expected.cond.embeddings
    # AdamW's first step has the size of the learning rate whatever the gradient's, so that
    # elements without one go either way.
    assert difference.norm() < 0.02 * moved.norm()
    assert moved.norm() > 1


@newest
def test_each_image_of_a_batch_has_an_embedding_of_its_own(comfy):
    changes = {"target_norm": 0.0, "iterations": 2}
    one = comfy.call(executed, "demo", 1, memorized(), changes)
    two = comfy.call(executed, "demo", 2, memorized(), changes)
    assert two["embeddings"].shape == (2, *one["embeddings"].shape[1:])
    np.testing.assert_allclose(two["embeddings"][:1], one["embeddings"], atol=1e-3)
    assert np.abs(two["embeddings"][1] - two["embeddings"][0]).max() > 0.01


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3", "flux"])
def test_every_architecture_keeps_its_weights_and_the_rest_of_the_prompt(comfy, kind):
    found = comfy.call(executed, kind, 1, "", {"target_norm": 0.0, "iterations": 3})
    assert found["after"] < found["before"]
    assert found["acted"]
    for kept in ("further", "others", "input", "weights", "inference"):
        assert found[kept], kept


@newest
def test_nothing_to_do_gives_the_very_object(comfy):
    for changes in ({"target_norm": 1e4}, {"iterations": 0}, {"gate": "never"}):
        found = comfy.call(executed, "sd1", 1, "", changes)
        assert found["same"]
        assert found["acted"] is False
    assert np.isnan(found["before"])


@newest
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"gate": "auto"}, "The gate auto needs a calibration"),
     ({"target_from": "calibration"}, "no calibration to take a target from"),
     ({"positive": "late"}, "begins after the first step")],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(comfy, changes, message):
    with pytest.raises(AssertionError, match=message):
        comfy.call(late if "positive" in changes else executed, "sd1", 1, "", changes)


def late(kind: str, batch: int, prompt: str, changes: dict) -> None:
    from tiny_networks import tiny_conditioning, tiny_model

    text = tiny_conditioning(kind, 1)
    text[0][1].update(start_percent=0.5, end_percent=1.0)
    pack("nodes.mitigate").MitigateMemorization.execute(
        model=tiny_model(kind), positive=text, negative=tiny_conditioning(kind, 2),
        latent={"samples": torch.zeros(batch, 4, 16, 16)}, **WIDGETS | {"gate": "always"},
    )  # fmt: skip


def cancelled(stop: int) -> dict:
    """Cancel the node at the end of forward pass `stop`."""
    from comfy.model_management import InterruptProcessingException

    with torch.inference_mode():
        model, clip, passes = demo(stop)
        weights = [
            (id(w), w.requires_grad) for w in model.model.state_dict(keep_vars=True).values()
        ]
        positive, negative = (
            pack("nodes.engine.measuring").encoded(clip, t) for t in ("a red cat", "")
        )
        before, stopped = positive[0][0].clone(), False
        try:
            pack("nodes.mitigate").MitigateMemorization.execute(
                model=model, positive=positive, negative=negative,
                latent={"samples": torch.zeros(1, 4, 16, 16)},
                **WIDGETS | {"gate": "always", "target_from": "norm", "target_norm": 0.0},
            )  # fmt: skip
        except InterruptProcessingException:
            stopped = True
        now = list(model.model.state_dict(keep_vars=True).values())
        return {
            "stopped": stopped,
            "passes": len(passes),
            "undone": [(id(weight), weight.requires_grad) for weight in now] == weights,
            "inference": all(weight.is_inference() for weight in now),
            "prompt": torch.equal(positive[0][0], before),
            "training": getattr(__import__("comfy").model_management, "in_training", False),
        }


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_cancel_within_an_iteration_leaves_everything_as_it_was(comfy, stop):
    assert comfy.call(cancelled, stop) == {
        "stopped": True, "passes": stop, "undone": True, "inference": True, "prompt": True,
        "training": False,
    }  # fmt: skip
