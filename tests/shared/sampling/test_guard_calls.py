"""The guard in every kind of call: arguments, callbacks, LoRA, dtypes and sizes of a run."""

from dataclasses import replace

import pytest
import tiny
import torch
from guards import (
    OTHERS,
    REWORDED,
    STEPS,
    Scripted,
    calibrated,
    parted,
    rewording,
    run,
    scale_of,
    unguided,
)
from unmemorize.shared.mitigation.method import Mitigation
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.sampling.guard import GuidanceIsOff, guard

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


@pytest.fixture(params=tiny.PIPELINES, scope="module")
def pipeline(request):
    return tiny.PIPELINES[request.param]()


@pytest.fixture(scope="module")
def sd1():
    return tiny.stable_diffusion()


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_negative_prompts_stay(name):
    pipeline = tiny.PIPELINES[name]()
    negative = {"negative_prompt": ["with a house", "a mat"]}
    expected, plain = run(pipeline, OTHERS, **negative), run(pipeline, **negative)
    calibration = calibrated(pipeline, True)
    with guard(pipeline, method=rewording(), calibration=calibration) as record:
        assert torch.equal(run(pipeline, **negative), expected)
        assert not torch.equal(run(pipeline), expected)
    assert not torch.equal(plain, expected)
    # What a prompt scores does not depend on the negative prompt.
    assert record.runs[0].images == record.runs[1].images


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_prompts_may_be_embeddings(name):
    pipeline = tiny.PIPELINES[name]()
    denoiser = PipelineDenoiser(pipeline)
    prompts, calibration = parted(pipeline, [False, True])
    cond, empty = denoiser.encode(prompts), denoiser.unconditional()[[0, 0]]
    given = {"prompt_embeds": cond.embeddings, "negative_prompt_embeds": empty.embeddings}
    if cond.pooled is not None:
        given |= {
            "pooled_prompt_embeds": cond.pooled, "negative_pooled_prompt_embeds": empty.pooled,
        }  # fmt: skip
    given |= {"true_cfg_scale": 5.0} if name == "flux" else {}
    plain = run(pipeline, None, **given)
    method = unguided()
    with guard(pipeline, method=method, calibration=calibration) as record:
        denoiser.encode(["a sea"])  # the user's own encoding is not part of the next call
        found = run(pipeline, None, **given)
    assert torch.equal(found[0], plain[0])
    assert not torch.equal(found[1], plain[1])
    assert [image.prompt for image in record.runs[0].images] == [None, None]
    assert [image.fired for image in record.runs[0].images] == [False, True]
    assert method.starts[0].prompts == ()
    torch.testing.assert_close(method.starts[0].cond.embeddings, cond.embeddings[1:])


def test_a_method_of_guidance_refuses_a_run_without(pipeline):
    method = Scripted(guide=lambda step: step.guided(1.0), needs_guidance=True)
    off = {scale_of(pipeline): 1.0}
    hint = scale_of(pipeline)
    with (
        guard(pipeline, method=method, gate="always"),
        pytest.raises(GuidanceIsOff, match=f"'scripted' acts on guidance.*`{hint}` above 1"),
    ):
        run(pipeline, **off)
    with guard(pipeline, method=method, gate="never"):
        run(pipeline, **off)
    expected = run(pipeline, OTHERS, **off)
    with guard(pipeline, method=rewording(), gate="always"):
        assert torch.equal(run(pipeline, **off), expected)  # what needs no guidance works


def test_callbacks_of_the_user_are_called_and_heard(pipeline):
    seen = []

    def halve(pipe, index, timestep, values):
        seen.append(index)
        return {"latents": values["latents"] * 0.5}

    plain = run(pipeline, callback_on_step_end=halve)
    with guard(pipeline, method=unguided(), calibration=calibrated(pipeline, False)):
        assert torch.equal(run(pipeline, callback_on_step_end=halve), plain)
    assert seen == [*range(STEPS)] * 2
    assert not torch.equal(run(pipeline), plain)


def test_guidance_switched_off_halfway_by_a_callback(sd1):
    def stop(pipe, index, timestep, values):
        if index == 0:
            pipe._guidance_scale = 1.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[1]
        return values

    kwargs = {
        "callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }  # fmt: skip
    expected = run(sd1, OTHERS, **kwargs)
    with guard(sd1, method=rewording(), gate="always"):
        assert torch.equal(run(sd1, **kwargs), expected)
    method = unguided()
    with guard(sd1, method=method, gate="always"):
        run(sd1, **kwargs)
    assert [step.index for step in method.steps] == [0]


def test_a_lora_stays_loaded_and_takes_part():
    from peft import LoraConfig

    pipeline = tiny.stable_diffusion()
    config = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    torch.manual_seed(3)
    pipeline.unet.add_adapter(config)
    prompts, calibration = parted(pipeline, [False, True])
    for kwargs in ({}, {"cross_attention_kwargs": {"scale": 0.5}}):
        plain = run(pipeline, prompts, **kwargs)
        expected = run(pipeline, [prompts[0], REWORDED[prompts[1]]], **kwargs)
        with guard(pipeline, method=rewording(), calibration=calibration):
            found = run(pipeline, prompts, **kwargs)
        assert torch.equal(found[0], plain[0])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    with PipelineDenoiser(pipeline).lora_disabled():
        assert not torch.equal(run(pipeline, prompts), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_half_precision(name, dtype):
    pipeline = tiny.PIPELINES[name]().to(dtype)
    prompts, calibration = parted(pipeline, [False, True])
    plain = run(pipeline, prompts)
    expected = run(pipeline, [prompts[0], REWORDED[prompts[1]]])
    for method in (rewording(), Scripted(guide=lambda step: step.from_x0(step.to_x0(step.cond)))):
        with guard(pipeline, method=method, calibration=calibration):
            found = run(pipeline, prompts)
        assert found.dtype == plain.dtype
        assert torch.equal(found[0], plain[0])
        assert (found[1] - plain[1]).abs().max() > 1e-3
        if not method.steps:
            torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_gradients_also_where_the_user_switched_inference_mode_on(sd1):
    def begin(start):
        leaf = start.cond.embeddings.clone().requires_grad_()
        cond = replace(start.cond, embeddings=leaf)
        score = start.denoiser.denoise(start.x, start.sigma, cond).square() / start.sigma
        score.sum().backward()
        return Mitigation(cond=replace(cond, embeddings=leaf - leaf.grad))

    def guide(step):
        with torch.enable_grad():
            x = step.x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad((x * step.cond * step.uncond).sum(), x)
        return step.guided() + 0 * gradient

    with torch.no_grad(), guard(sd1, method=Scripted(begin, guide), gate="always"):
        expected = run(sd1)
    with torch.inference_mode(), guard(sd1, method=Scripted(begin, guide), gate="always"):
        assert torch.equal(run(sd1), expected)


def test_runs_of_another_size_than_the_calibration(pipeline):
    prompts, calibration = parted(pipeline, [False, True])
    size = {"height": 64, "width": 96}
    plain = run(pipeline, prompts, **size)
    expected = run(pipeline, [prompts[0], REWORDED[prompts[1]]], **size)
    method = rewording()
    with guard(pipeline, method=method, calibration=calibration) as record:
        found = run(pipeline, prompts, **size)
        run(pipeline, prompts)
    assert torch.equal(found[0], plain[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    wide, square = method.starts
    assert wide.denoiser.latent_shape[-2:] == (16, 24)
    assert wide.x.shape[1:] == wide.denoiser.latent_shape
    assert square.calibration is calibration
    assert wide.calibration.threshold == pytest.approx(calibration.threshold * 1.5**0.5)
    assert wide.calibration.threshold_for(1) == pytest.approx(
        calibration.threshold_for(1) * 1.5**0.5
    )
    # The probe is made at the calibration's size: the same prompts, the same scores.
    scores = [[image.score_before for image in r.images] for r in record.runs]
    assert scores[0] == scores[1]
