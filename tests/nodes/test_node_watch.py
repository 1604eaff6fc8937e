"""The watch reads true scores from any sampling, changes no image and asks the network nothing."""

import numpy as np
import pytest
import torch
from comfyui import pack
from demo_side import denoiser
from unmemorize.shared.sampling.observer import observe
from watched_sampling import PROMPT, STEPS, sample

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize(
    ("changes", "batch"),
    [({}, 1), ({}, 3), ({"sampler_name": "heun"}, 1), ({"sampler_name": "dpmpp_2m_sde"}, 2),
     ({"cfg": 1.0}, 1)],
)  # fmt: skip
def test_images_are_bit_identical_and_the_network_is_asked_nothing(comfy, changes, batch):
    plain = sample(comfy, changes, batch=batch)
    watched = sample(comfy, changes, options={}, batch=batch)
    assert np.array_equal(plain["samples"], watched["samples"])
    assert plain["calls"] == watched["calls"] > 0
    assert plain["rows"] == watched["rows"]
    other = sample(comfy, changes | {"seed": 2}, batch=batch)
    assert not np.array_equal(plain["samples"], other["samples"])


def test_scores_are_those_of_the_observer_in_diffusers(comfy):
    """The same x at the same levels; 2e-5 relative is what sums in another order leave."""
    pipeline = denoiser().pipeline
    config = dict(pipeline.scheduler.config) | {"timestep_spacing": "trailing"}
    scheduler, pipeline.scheduler = pipeline.scheduler, type(pipeline.scheduler).from_config(config)
    try:
        with observe(pipeline) as record:
            pipeline(
                PROMPT, num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent",
                generator=torch.Generator("cpu").manual_seed(1), height=128, width=128,
            )  # fmt: skip
    finally:
        pipeline.scheduler = scheduler
    expected = record.runs[0].l2
    timesteps = [round(t) for t in record.runs[0].timesteps]
    found = comfy.call(at_timesteps, timesteps)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=2e-5, atol=0)
    assert expected.std() > 0.01 * expected.mean()


def at_timesteps(timesteps: list) -> torch.Tensor:
    """Return the watched scores of a run over given training timesteps."""
    import comfy.sample
    import comfy.samplers

    model, clip, _ = pack("nodes.engine.demo_model").load_model()
    model, record = pack("nodes.engine.watching").watch(model)
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.cat([sampling.sigmas[timesteps].cpu(), torch.zeros(1)])
    with torch.inference_mode():
        positive, negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (PROMPT, "")
        )
        latent = torch.zeros(1, 4, 16, 16)
        comfy.sample.sample_custom(
            model, comfy.sample.prepare_noise(latent, 1), 5.0,
            comfy.samplers.sampler_object("euler"), sigmas, positive, negative, latent, seed=1,
        )  # fmt: skip
    return record.runs[0].traces


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["PerturbedAttentionGuidance", "APG", "TCFG", "RescaleCFG"])
def test_other_guidance_does_not_reach_the_first_score(comfy, name, before):
    alone = sample(comfy, options={})
    both = sample(comfy, options={}, between=[name], before=before)
    # Later steps differ: the image is another one.
    np.testing.assert_allclose(both["traces"][0][:, 0], alone["traces"][0][:, 0], rtol=1e-6)
    assert alone["traces"][0][0, 0] > 0.1
    unwatched = sample(comfy, between=[name])
    assert np.array_equal(both["samples"], unwatched["samples"])
    assert both["calls"] == unwatched["calls"]
    assert not np.array_equal(both["samples"], alone["samples"])


def test_rows_are_per_image_and_levels_are_those_of_the_sampler(comfy):
    three = sample(comfy, options={}, batch=3)
    assert three["traces"][0].shape == (3, STEPS)
    assert len(set(three["traces"][0][:, 0])) == 3
    heun = sample(comfy, {"sampler_name": "heun"}, options={})
    assert heun["sigmas"] == pytest.approx(np.array(three["sigmas"]), rel=1e-5)
    np.testing.assert_allclose(heun["traces"][0][0, 0], three["traces"][0][0, 0], rtol=0.5)


def test_cfg_1_is_measured_only_when_asked_and_then_costs_a_pass_a_step(comfy):
    plain = sample(comfy, {"cfg": 1.0}, options={})
    assert plain["traces"][0].size == 0
    assert "measure_anyway" in plain["reasons"][0]
    anyway = sample(comfy, {"cfg": 1.0}, options={"measure_anyway": True})
    assert np.array_equal(anyway["samples"], plain["samples"])
    assert anyway["calls"] == plain["calls"] + STEPS
    assert anyway["extra"] == [STEPS]
    guided = sample(comfy, options={"measure_anyway": True})
    assert guided["extra"] == [0]
    np.testing.assert_allclose(
        anyway["traces"][0][:, 0], guided["traces"][0][:, 0], rtol=1e-5
    )  # the first step begins at the same x
