"""Every method at work on real pipelines: on the images that fired, and undone afterwards."""

import pytest
import tiny
import torch
from guards import parted, parted_by_residual, run, scale_of, trace_of
from unmemorize.shared.mitigation import METHODS, make_method
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.sampling.guard import guard

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")

SETTINGS = {
    "embedding": {"target": 0.0, "iterations": 2},
    "initial_noise": {"target": 0.0, "iterations": 2},
    "ordinary": {"iterations": 2},
    "neighbour": {"bound_start": -1.0, "bound_end": -1.0, "captions": ("a green dog",)},
}
"""That make them act, and quickly; "neighbour" also gets an image."""
BY_RESIDUAL = ("reword", "ordinary")
"""That lower the residual score; where magnitudes judge, the first may end in "embedding"."""
REPLACES_COND = ("reword", "ordinary", "embedding", "random_words")


@pytest.fixture(params=tiny.PIPELINES, scope="module")
def pipeline(request):
    return tiny.PIPELINES[request.param]()


def method_for(pipeline, name):
    settings = dict(SETTINGS.get(name, {}))
    if name == "neighbour":
        shape = PipelineDenoiser(pipeline).latent_shape
        settings["latents"] = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return make_method(name, **settings)


def test_there_are_settings_for_methods_only():
    assert METHODS.keys() >= SETTINGS.keys() | set(REPLACES_COND)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_acts_on_what_fired_and_leaves_no_trace(pipeline, name):
    part = parted_by_residual if name in BY_RESIDUAL else parted
    prompts, calibration = part(pipeline, [False, True])
    before, plain = trace_of(pipeline), run(pipeline, prompts)
    if name == "attention" and not hasattr(pipeline, "unet"):
        with (
            guard(pipeline, method=method_for(pipeline, name), calibration=calibration),
            pytest.raises(ValueError, match="U-Net"),
        ):
            run(pipeline, prompts)
        assert trace_of(pipeline) == before
        return
    with guard(pipeline, method=method_for(pipeline, name), calibration=calibration) as record:
        found = run(pipeline, prompts)
        assert torch.equal(run(pipeline, prompts), found)  # a run can be repeated
    assert torch.equal(found[0], plain[0])
    assert (found[1] - plain[1]).abs().max() > 1e-4
    assert trace_of(pipeline) == before
    assert torch.equal(run(pipeline, prompts), plain)
    image = record.runs[0].images[1]
    assert image.method == name
    assert (image.score_after is not None) == (name in REPLACES_COND)
    assert (image.noise_after is not None) == (name == "initial_noise")
    if name == "embedding":
        assert image.score_after != image.score_before
    if name == "initial_noise":
        assert image.noise_after < image.noise_before


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.needs_guidance])
def test_methods_that_need_no_guidance_work_without(pipeline, name):
    part = parted_by_residual if name in BY_RESIDUAL else parted
    prompts, calibration = part(pipeline, [True, False])
    off = {scale_of(pipeline): 1.0}
    plain = run(pipeline, prompts, **off)
    with guard(pipeline, method=method_for(pipeline, name), calibration=calibration):
        found = run(pipeline, prompts, **off)
    assert torch.equal(found[1], plain[1])
    assert (found[0] - plain[0]).abs().max() > 1e-5
