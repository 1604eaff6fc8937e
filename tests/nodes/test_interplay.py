"""Core nodes that reuse steps, decode in tiles or replace the schedule, around a watch."""

import math

import numpy as np
import pytest
from comfyui import newest, node
from watched_sampling import TEXTS, WATCH, report, sampler

pytestmark = pytest.mark.comfy
STEPS = 8
CACHE = {"reuse_threshold": 3.0, "start_percent": 0.3, "end_percent": 0.95, "verbose": False}
BETWEEN = {
    "EasyCache": CACHE,
    "LazyCache": CACHE,
    "ModelSamplingDiscrete": {"sampling": "eps", "zsnr": False},
    "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
}
KEEP = {"samples": ["sampler", 0], "score": ["report", 3], "text": ["report", 2]}


def graph(kind: str | None, *, watched: bool, after: bool = True) -> dict:
    """Return a graph with one core node between model and sampler, after the watch or before it."""
    made, model = dict(TEXTS), ["1", 0]
    order = [kind, "watch"] if not after else ["watch", kind]
    for name in filter(None, order):
        if name == "watch":
            if watched:
                made["watch"] = node("UnmemorizeWatch", model=model, measure_anyway=False)
                model = ["watch", 0]
        else:
            made["between"] = node(name, model=model, **BETWEEN[name])
            model = ["between", 0]
    made["sampler"] = sampler(model, steps=STEPS)
    if watched:
        made["report"] = report(["sampler", 0])
    return made


@newest
@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("kind", BETWEEN)
def test_the_same_images_and_a_score_of_the_first_step(comfy, kind, after):
    alone = comfy.run(graph(kind, watched=False), keep={"samples": KEEP["samples"]})
    run = comfy.run(graph(kind, watched=True, after=after), keep=KEEP)
    np.testing.assert_array_equal(run["samples"]["samples"], alone["samples"]["samples"])
    plain = comfy.run(graph(None, watched=True), keep=KEEP)
    if kind == "FreeU_V2":  # it changes what the network predicts
        assert math.isfinite(run["score"])
    else:
        assert run["score"] == pytest.approx(plain["score"], rel=1e-5)
    if kind in ("EasyCache", "LazyCache"):  # it did reuse steps
        assert not np.array_equal(run["samples"]["samples"], plain["samples"]["samples"])


@newest
def test_a_reported_latent_is_decoded_in_tiles(comfy):
    watched = TEXTS | WATCH | {"sampler": sampler(["watch", 0]), "report": report(["sampler", 0])}
    tiles = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    for name, latent in (("reported", ["report", 0]), ("sampled", ["sampler", 0])):
        watched[name] = node("VAEDecodeTiled", samples=latent, vae=["1", 2], **tiles)
    run = comfy.run(watched, keep={name: [name, 0] for name in ("reported", "sampled")})
    np.testing.assert_array_equal(run["reported"], run["sampled"])
    assert run["reported"].std() > 0.05
