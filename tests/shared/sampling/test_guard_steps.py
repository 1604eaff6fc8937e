"""What a method is told at the start and at every step, and what becomes of its answers."""

from functools import partial

import diffusers
import guards
import pytest
import tiny
import torch
from guards import (
    PROMPTS,
    REWORDED,
    STEPS,
    Scripted,
    calibrated,
    parted,
    renoising,
    rewording,
    run,
    unguided,
)
from unmemorize.shared.mitigation.method import Mitigation
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.calls.network_call import Layout, NetworkCall
from unmemorize.shared.sampling.guard import guard
from unmemorize.shared.sampling.observer import observe
from unmemorize.shared.score.denoiser import Conditioning, concatenate
from unmemorize.shared.score.metrics import text_noise_norm
from unmemorize.shared.score.noise_levels import output_from_x0, x0_from_output

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
    # Schedulers of diffusers hand tensors to numpy.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler linspace": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++ sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "heun, two calls a step": ("HeunDiscreteScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "runge-kutta, four calls a step": ("PNDMScheduler", {"skip_prk_steps": False}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
}


@pytest.fixture(params=tiny.PIPELINES, scope="module")
def pipeline(request):
    return tiny.PIPELINES[request.param]()


@pytest.fixture(params=SCHEDULERS)
def scheduled(request):
    """A pipeline with one of the schedulers that keep the noise at different scales."""
    name, settings = SCHEDULERS[request.param]
    made = tiny.stable_diffusion("v_prediction" if request.param == "dpm++ 2m" else "epsilon")
    made.scheduler = getattr(diffusers, name).from_config(made.scheduler.config, **settings)
    return made


def noise_of(pipeline, seeds=(7, 8)):
    """Noise of std 1, [seed *latent]."""
    shape = PipelineDenoiser(pipeline).latent_shape
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def packed(pipeline, noise):
    return PipelineDenoiser(pipeline).family.pack(noise)


def test_every_scheduler(scheduled):
    run = partial(guards.run, num_inference_steps=4)  # fewer are too few for Runge and Kutta
    prompts, calibration = parted(scheduled, [False, True])
    plain, shut = run(scheduled, prompts), calibrated(scheduled, False)
    for kwargs in (
        {"method": unguided(), "calibration": shut},
        {"method": Scripted(), "gate": "always"},
    ):
        with guard(scheduled, **kwargs):
            assert torch.equal(run(scheduled, prompts), plain)
    expected = run(scheduled, [prompts[0], REWORDED[prompts[1]]])
    with guard(scheduled, method=rewording(), calibration=calibration):
        found = run(scheduled, prompts)
    assert torch.equal(found[0], plain[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    expected = run(scheduled, prompts, guidance_scale=1.0)
    with guard(scheduled, method=unguided(), calibration=calibration):
        found = run(scheduled, prompts)
    assert torch.equal(found[0], plain[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4)
    latents = noise_of(scheduled)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    for generator in generators:  # noise that schedulers add later is drawn after the first
        torch.randn(latents[0].shape, generator=generator)
    expected = run(scheduled, prompts, latents=latents, generator=generators)
    with guard(scheduled, method=renoising(latents), gate="always"):
        torch.testing.assert_close(run(scheduled, prompts), expected, rtol=1e-3, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-2


def test_other_noise_gives_the_images_of_that_noise(pipeline):
    latents, plain = noise_of(pipeline), run(pipeline)
    expected = run(pipeline, latents=packed(pipeline, latents))
    calibration = calibrated(pipeline, True)
    method = renoising(latents)
    with guard(pipeline, method=method, calibration=calibration) as record:
        torch.testing.assert_close(run(pipeline), expected, rtol=1e-3, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-2
    denoiser, start = PipelineDenoiser(pipeline), method.starts[0]
    scale = denoiser.schedule.latent_scale(float(start.sigma))
    for x, name in ((start.x, "noise_before"), (latents * scale, "noise_after")):
        norms = magnitude(denoiser, x, start.sigma, start.cond)
        found = torch.tensor([getattr(image, name) for image in record.runs[0].images])
        torch.testing.assert_close(found, norms, rtol=1e-4, atol=1e-5)
    assert {image.score_after for image in record.runs[0].images} == {None}
    torch.testing.assert_close(run(pipeline), plain, rtol=0, atol=0)


def test_only_noise_that_changes_is_replaced(pipeline):
    """A method hands back what it could not improve: those images stay, bit for bit."""
    plain, latents = run(pipeline), noise_of(pipeline)

    def begin(start):
        scale = start.denoiser.schedule.latent_scale(float(start.sigma))
        return Mitigation(x=torch.stack([start.x[0], latents[1] * scale]))

    with guard(pipeline, method=Scripted(begin), gate="always"):
        found = run(pipeline)
    assert torch.equal(found[0], plain[0])
    assert (found[1] - plain[1]).abs().max() > 1e-2
    with guard(pipeline, method=Scripted(lambda s: Mitigation(x=s.x.clone())), gate="always"):
        assert torch.equal(run(pipeline), plain)


@torch.no_grad()
def magnitude(denoiser, x, sigma, cond):
    empty = denoiser.unconditional()[[0] * len(x)]
    rows = [denoiser.denoise(x, sigma, c) for c in (cond, empty)]
    return text_noise_norm(*rows) / sigma


def test_the_start_is_where_detection_measures(pipeline):
    """The run's noise, brought to the calibrated level, is what the denoiser starts from."""
    denoiser, method = PipelineDenoiser(pipeline), Scripted()
    with guard(pipeline, method=method, gate="always", seed=5):
        run(pipeline)
        run(pipeline, num_inference_steps=2)
    first, second = method.starts
    sigma = denoiser.sigmas(50)[0]
    x = denoiser.initial_noise((0, 1), sigma)
    assert first.sigma == sigma
    torch.testing.assert_close(first.x, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.x, x, rtol=1e-5, atol=1e-5)
    cond = denoiser.encode(PROMPTS)
    torch.testing.assert_close(first.cond.embeddings, cond.embeddings)
    if cond.pooled is not None:
        torch.testing.assert_close(first.cond.pooled, cond.pooled)
    with torch.no_grad():
        empty = denoiser.unconditional()[[0, 0]]
        torch.testing.assert_close(first.x0_uncond, denoiser.denoise(x, sigma, empty))
    assert not first.x0_uncond.requires_grad
    assert first.prompts == tuple(PROMPTS)
    assert first.network is denoiser.family.network
    draws = [torch.rand(3, generator=start.generator) for start in (first, second)]
    assert torch.equal(*draws)  # the same in every run
    assert torch.equal(draws[0], torch.rand(3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_the_start_does_not_depend_on_the_scheduler(spacing):
    pipeline = tiny.stable_diffusion(timestep_spacing=spacing)
    x = []
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        method = Scripted()
        with guard(pipeline, method=method, gate="always"):
            run(pipeline)
        x.append(method.starts[0].x)
    torch.testing.assert_close(x[1], x[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x[2], x[0], rtol=1e-5, atol=1e-5)


def test_what_a_step_says(pipeline):
    """Against the denoiser, and against what an observer measures."""
    method, predicted, from_empty = Scripted(), [], []
    nothing = PipelineDenoiser(pipeline).unconditional()[[0, 0]]

    def guide(step):
        predicted.append(step.predict())
        from_empty.append(step.predict(nothing))

    method.guide = guide
    with observe(pipeline) as record, guard(pipeline, method=method, gate="always"):
        run(pipeline)
    denoiser = PipelineDenoiser(pipeline)
    steps, sigmas = method.steps, denoiser.sigmas(STEPS)
    assert [step.index for step in steps] == [0, 1, 2]
    assert {step.cond_scale for step in steps} == {5.0}
    torch.testing.assert_close(
        torch.stack([step.magnitude for step in steps], 1).double(),
        record.runs[0].l2, rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    cond, empty = denoiser.encode(PROMPTS), denoiser.unconditional()[[0, 0]]
    for step, sigma, prediction in zip(steps, sigmas, predicted, strict=False):
        x = step.x * denoiser.schedule.latent_scale(float(sigma))
        torch.testing.assert_close(prediction, step.cond, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(from_empty[step.index], step.uncond, rtol=1e-3, atol=1e-5)
        if denoiser.guidance_distilled:
            denoiser.family.guidance_embedding = 3.5  # what `run` gives
        with torch.no_grad():
            for output, rows in ((step.cond, cond), (step.uncond, empty)):
                x0 = denoiser.denoise(x, sigma, rows)
                torch.testing.assert_close(step.to_x0(output), x0, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(step.from_x0(x0), output, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(step.to_x0(step.cond), step.to_x0(step.uncond), rtol=1e-3)
    percents = [step.percent for step in steps]
    assert percents == sorted(percents)
    assert 0 <= percents[0] < 0.4
    assert percents[-1] < 1
    if denoiser.parametrization == "flow":
        expected = 1 - sigmas[:STEPS]
    else:
        expected = 1 - denoiser.schedule.scheduler.timesteps / 999
    torch.testing.assert_close(torch.tensor(percents), expected.float(), rtol=1e-4, atol=1e-5)


def test_one_more_pass_reads_only_the_rows_that_fired(pipeline):
    prompts, calibration = parted(pipeline, [False, True])
    method, rows = Scripted(), []
    network = PipelineDenoiser(pipeline).family.network
    handle = network.register_forward_hook(lambda m, a, o: rows.append(len(o[0])))

    def guide(step):
        rows.clear()
        assert torch.allclose(step.predict(), step.cond, rtol=1e-3, atol=1e-5)
        assert rows == [1]

    method.guide = guide
    with guard(pipeline, method=method, calibration=calibration):
        run(pipeline, prompts)
    handle.remove()
    assert len(method.steps) == STEPS


def test_guidance_rescale_leaves_what_the_method_says():
    pipeline = tiny.stable_diffusion()
    expected = run(pipeline, guidance_scale=1.0)
    with guard(pipeline, method=unguided(), gate="always"):
        torch.testing.assert_close(
            run(pipeline, guidance_rescale=0.7), expected, rtol=1e-3, atol=1e-4
        )
    assert not torch.allclose(run(pipeline, guidance_rescale=0.7), run(pipeline), atol=1e-3)


def test_skipped_layers_leave_what_the_method_says():
    """SD3 adds the difference to a second conditional pass."""
    pipeline = tiny.stable_diffusion_3()
    skip = {
        "skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_scale": 3.0,
    }  # fmt: skip
    prompts, calibration = parted(pipeline, [False, True])
    plain = run(pipeline, prompts, **skip)
    assert not torch.allclose(plain, run(pipeline, prompts), atol=1e-3)
    with guard(pipeline, method=Scripted(guide=lambda step: None), gate="always"):
        assert torch.equal(run(pipeline, prompts, **skip), plain)
    for method, expected in (
        (unguided(), run(pipeline, prompts, guidance_scale=1.0)),
        (rewording(), run(pipeline, [prompts[0], REWORDED[prompts[1]]], **skip)),
    ):
        with guard(pipeline, method=method, calibration=calibration):
            found = run(pipeline, prompts, **skip)
        assert torch.equal(found[0], plain[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4)


def test_networks_that_answer_with_an_object():
    pipeline = tiny.stable_diffusion()
    prompts, calibration = parted(pipeline, [False, True])
    plain, expected = run(pipeline, prompts), run(pipeline, prompts, guidance_scale=1.0)
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda *args, **kwargs: forward(
        *args, **{**kwargs, "return_dict": True}
    )
    with guard(pipeline, method=unguided(), calibration=calibration):
        found = run(pipeline, prompts)
    assert torch.equal(found[0], plain[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4)


def test_answers_that_do_not_fit_are_refused(pipeline):
    def longer(start):
        return Mitigation(cond=concatenate([start.cond] * 2))

    for method, match in (
        (Scripted(lambda s: Mitigation(x=s.x[:1])), "noise by 'scripted' of shape"),
        (Scripted(longer), "embeddings by 'scripted' of shape"),
        (Scripted(guide=lambda step: step.cond[:1]), "a guided prediction of shape"),
    ):
        with guard(pipeline, method=method, gate="always"), pytest.raises(ValueError, match=match):
            run(pipeline)


@pytest.mark.parametrize("parametrization", ["epsilon", "v_prediction", "flow"])
def test_predictions_and_clean_latents_are_inverse(parametrization):
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    for sigma in (0.03, 0.9):
        x0 = x0_from_output(parametrization, x, sigma, output)
        back = output_from_x0(parametrization, x, sigma, x0)
        torch.testing.assert_close(back, output)
        assert not torch.allclose(x0, x)


def test_levels_between_timesteps_are_those_of_the_scheduler():
    pipeline = tiny.stable_diffusion()
    scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, use_karras_sigmas=True
    )
    scheduler.set_timesteps(7)
    schedule = PipelineDenoiser(pipeline).schedule
    found = [schedule.sigma(float(timestep)) for timestep in scheduler.timesteps]
    torch.testing.assert_close(torch.tensor(found), scheduler.sigmas[:-1], rtol=1e-5, atol=0)
    assert any(float(timestep) % 1 for timestep in scheduler.timesteps)


def test_a_call_cut_to_rows_keeps_what_has_none():
    kwargs = {
        "hidden_states": torch.arange(8.0).view(4, 2), "timestep": torch.tensor(3.0),
        "encoder_hidden_states": torch.arange(4.0), "txt_ids": torch.zeros(4, 3),
        "img_ids": torch.zeros(4, 3), "guidance": None, "return_dict": False,
        "added_cond_kwargs": {
            "text_embeds": torch.arange(4.0), "time_ids": [torch.arange(4.0)],
        },
    }  # fmt: skip
    rows = {("hidden_states",): 0, ("encoder_hidden_states",): 0,
            ("added_cond_kwargs", "text_embeds"): 0}  # fmt: skip
    layout = Layout(
        latents=("hidden_states",), rows=rows,
        embeddings=("encoder_hidden_states",), pooled=("added_cond_kwargs", "text_embeds"),
    )  # fmt: skip
    call = NetworkCall(args=(), kwargs=kwargs, names=(), layout=layout)
    cut = call.only([1, 3])
    assert cut.latents.tolist() == [[2, 3], [6, 7]]
    text = cut.conditioning([0, 1])
    assert text.embeddings.tolist() == text.pooled.tolist() == [1, 3]
    assert len(cut.kwargs["added_cond_kwargs"]["time_ids"][0]) == 4
    assert cut.kwargs["txt_ids"].shape == cut.kwargs["img_ids"].shape == (4, 3)
    assert cut.time == 3
    cond = Conditioning(embeddings=torch.tensor([8.0]), pooled=torch.tensor([9.0]))
    changed = call.with_conditioning([0], cond)
    assert changed.conditioning([0, 1]).embeddings.tolist() == [8, 1]
    every = range(4)
    assert changed.conditioning(every).pooled.tolist() == [9, 1, 2, 3]
    assert call.conditioning(every).pooled.tolist() == [0, 1, 2, 3]  # the caller's own stay
