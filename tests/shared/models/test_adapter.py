"""The adapter agrees with what real pipelines do, for every family."""

from itertools import pairwise

import pytest
import tiny
import torch
from unmemorize.shared.models.adapter import DISTILLED, PipelineDenoiser
from unmemorize.shared.score.denoiser import concatenate

PROMPTS = ["a red cat, Sitting on the mat", "tall tree"]
SEEDS = (3, 4)
STEPS = 4
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


@pytest.fixture(scope="module", params=tiny.PIPELINES)
def denoiser(request):
    return PipelineDenoiser(tiny.PIPELINES[request.param]())


@torch.no_grad()
def sample(denoiser, prompts, cond_scale: float, steps: int = STEPS, parts: int = 1):
    """Return final latents in the pipeline's own scale, by the protocol alone."""
    sigmas = denoiser.sigmas(steps)
    x = denoiser.initial_noise(SEEDS[: len(prompts)], sigmas[0])
    cond = denoiser.encode(prompts)
    uncond = denoiser.unconditional()[[0] * len(prompts)]
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoiser.denoise(x, sigma, cond)
        if not denoiser.guidance_distilled:
            base = denoiser.denoise(x, sigma, uncond)
            x0 = base + cond_scale * (x0 - base)
        x = x0 + sigma_next / sigma * (x - x0)
    return x / denoiser.schedule.latent_scale(float(sigmas[-1]))


def sample_for_real(denoiser, prompts, cond_scale: float, steps: int = STEPS):
    pipeline = denoiser.pipeline
    latents = pipeline(
        prompts, num_inference_steps=steps, guidance_scale=cond_scale, output_type="latent",
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS[: len(prompts)]],
    ).images  # fmt: skip
    if denoiser.guidance_distilled:
        latents = pipeline._unpack_latents(latents, *denoiser.resolution, pipeline.vae_scale_factor)
    return latents


def test_sampling_through_the_protocol_is_the_pipelines_sampling(denoiser):
    scale = 3.5 if denoiser.guidance_distilled else 5.0
    real = sample_for_real(denoiser, PROMPTS, scale)
    # Errors of one float32 rounding per step, amplified by guidance.
    torch.testing.assert_close(sample(denoiser, PROMPTS, scale), real, rtol=1e-4, atol=1e-4)
    other = sample_for_real(denoiser, PROMPTS[::-1], scale)
    assert (real - other).abs().max() > 0.1  # the text decides, the case is not trivial


@pytest.mark.parametrize(
    ("prediction", "settings"),
    [
        ("epsilon", {"set_alpha_to_one": True}),
        ("v_prediction", {"timestep_spacing": "trailing"}),
        ("v_prediction", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ],
)
def test_schedules_follow_the_configuration(prediction, settings):
    denoiser = PipelineDenoiser(tiny.stable_diffusion(prediction, **settings))
    real = sample_for_real(denoiser, PROMPTS, 5.0, steps=5)
    # Zero terminal SNR: sigma is infinite there and stands at 4096, which costs digits.
    tolerance = 5e-3 if "rescale_betas_zero_snr" in settings else 1e-4
    mine = sample(denoiser, PROMPTS, 5.0, steps=5)
    torch.testing.assert_close(mine, real, rtol=tolerance, atol=tolerance)


def test_noise_levels_fall_from_the_noisiest(denoiser):
    sigmas = denoiser.sigmas(10)
    assert sigmas.shape == (11,)
    assert (sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match=r"`steps` must be"):
        denoiser.sigmas(0)


def test_text_noise_is_what_the_network_predicts_differently(denoiser):
    """(x0_uncond - x0_cond) / sigma is the difference of noises, or of a flow's velocities."""
    sigma = denoiser.sigmas(STEPS)[1]
    x = denoiser.initial_noise(SEEDS, sigma)
    cond, uncond = denoiser.encode(PROMPTS), denoiser.unconditional()[[0, 0]]
    with torch.no_grad():
        delta = (denoiser.denoise(x, sigma, uncond) - denoiser.denoise(x, sigma, cond)) / sigma
        scale = (1 + float(sigma) ** 2) ** 0.5
        flow = denoiser.parametrization == "flow"
        timestep = denoiser.schedule.timestep(float(sigma))
        raw = [
            denoiser.family.predict(x if flow else x / scale, timestep, c) for c in (cond, uncond)
        ]
    expected = raw[0] - raw[1]
    if denoiser.parametrization == "v_prediction":
        expected = expected / scale  # eps = sqrt(abar) v + sqrt(1 - abar) x
    torch.testing.assert_close(delta, expected, rtol=1e-3, atol=1e-5)
    assert delta.abs().max() > 1e-3


def test_gradients_reach_the_embeddings(denoiser):
    sigma = denoiser.sigmas(STEPS)[0]
    x = denoiser.initial_noise(SEEDS[:1], sigma)
    cond = denoiser.encode(PROMPTS[:1])
    cond.embeddings.requires_grad_()
    denoiser.denoise(x, sigma, cond).square().sum().backward()
    assert cond.embeddings.grad.abs().sum() > 0
    assert all(p.grad is None for p in denoiser.family.network.parameters())


def test_rows_do_not_depend_on_their_neighbours(denoiser):
    both, one = denoiser.encode(PROMPTS), denoiser.encode(PROMPTS[1:])
    torch.testing.assert_close(both.embeddings[1:], one.embeddings)
    sigma = denoiser.sigmas(STEPS)[0]
    x = denoiser.initial_noise(SEEDS, sigma)
    with torch.no_grad():
        together = denoiser.denoise(x, sigma, both)
        alone = denoiser.denoise(x[1:], sigma, one)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)
    assert len(concatenate([both, one])) == 3
    with pytest.raises(ValueError, match="one row per row"):
        denoiser.denoise(x, sigma, one)


def test_every_position_of_the_embeddings_has_a_token(denoiser):
    cond = denoiser.encode([*PROMPTS, "", "   "])
    assert all(len(tokens) == cond.embeddings.shape[1] for tokens in cond.tokens)
    assert cond.words[0] == ("a", "red", "cat,", "Sitting", "on", "the", "mat")
    read = {t.word for t in cond.tokens[0]} - {None}
    assert read >= set(range(7 - len(cond.cut[0].split())))
    pieces = [t.text for t in cond.tokens[0] if t.word == 2]
    assert "".join(pieces).startswith("cat,")
    for row in (2, 3):
        assert cond.words[row] == ()
        assert all(t.word is None for t in cond.tokens[row])
    with pytest.raises(ValueError, match="list of at least one"):
        denoiser.encode([])
    with pytest.raises(ValueError, match="list of at least one"):
        denoiser.encode("a cat")


@pytest.mark.parametrize("text", ["日本 mat", "<b>cat</b> \x00\x1f dog", "🐈‍⬛ naïve", "مرحبا cat"])
def test_any_script_is_read(denoiser, text):
    cond = denoiser.encode([text])
    owners = [t.word for t in cond.tokens[0] if t.word is not None]
    assert torch.isfinite(cond.embeddings).all()
    assert max(owners) < len(cond.words[0]) == len(text.split())


def test_what_does_not_fit_is_cut_and_told(denoiser, caplog):
    prompt = " ".join(["cat"] * 10_000)
    cond = denoiser.encode([prompt])
    read = {t.word for t in cond.tokens[0]} - {None}
    # T5 reads further than CLIP: what no encoder reads is cut.
    assert len(cond.cut[0].split()) == 10_000 - len(read) > 9_000
    assert "too long for the text encoder" in caplog.text
    assert denoiser.encode(["a cat"]).cut == ("",)


def test_a_half_read_word_counts_as_cut():
    denoiser = PipelineDenoiser(tiny.stable_diffusion())
    room = tiny.CLIP_LENGTH - 2
    cond = denoiser.encode([" ".join(["cat"] * (room - 1) + ["qqqq", "dog"])])
    assert cond.cut == ("qqqq dog",)
    assert cond.tokens[0][room].word == room - 1


def test_initial_noise_belongs_to_the_seed_alone(denoiser):
    sigma = denoiser.sigmas(STEPS)[0]
    several = denoiser.initial_noise((5, 6, 7), sigma)
    assert torch.equal(several[1:2], denoiser.initial_noise((6,), sigma))
    assert not torch.equal(several[0], several[1])
    assert several.shape[1:] == denoiser.latent_shape


def test_generate_is_the_pipelines_own_call(denoiser):
    pipeline = denoiser.pipeline
    before = dict(vars(pipeline))
    images = denoiser.generate(PROMPTS, SEEDS, steps=2, cond_scale=5.0)
    assert vars(pipeline)["_progress_bar_config"] == before["_progress_bar_config"]
    scale = 3.5 if denoiser.guidance_distilled else 5.0
    real = pipeline(
        PROMPTS, num_inference_steps=2, guidance_scale=scale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
    ).images  # fmt: skip
    assert [i.tobytes() for i in images] == [r.tobytes() for r in real]
    assert len(denoiser.generate(["a cat"], (1, 2), steps=1)) == 2
    with pytest.raises(ValueError, match="one seed per prompt"):
        denoiser.generate(PROMPTS, (1, 2, 3))


def test_decode_is_the_pipelines_decoding(denoiser):
    real = denoiser.generate(PROMPTS[:1], SEEDS[:1], steps=2, cond_scale=5.0)[0]
    scale = 3.5 if denoiser.guidance_distilled else 5.0
    latents = sample_for_real(denoiser, PROMPTS[:1], scale, steps=2)
    mine = (denoiser.decode(latents)[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert mine.tobytes() == real.tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_near_those_of_float32(dtype):
    scores = []
    for kind in (torch.float32, dtype):
        denoiser = PipelineDenoiser(tiny.stable_diffusion().to(kind))
        assert denoiser.dtype == kind
        sigma = denoiser.sigmas(STEPS)[0]
        x = PipelineDenoiser(tiny.stable_diffusion()).initial_noise(SEEDS, sigma)
        cond, uncond = denoiser.encode(PROMPTS), denoiser.unconditional()[[0, 0]]
        with torch.no_grad():
            delta = denoiser.denoise(x, sigma, uncond) - denoiser.denoise(x, sigma, cond)
        assert delta.dtype == torch.float32
        scores.append((delta / sigma).flatten(1).norm(dim=1))
    torch.testing.assert_close(scores[1], scores[0], rtol=0.1, atol=0)  # 8 bits of mantissa


def test_guidance_moves_away_from_what_the_pipeline_does():
    zeros = PipelineDenoiser(tiny.stable_diffusion_xl(force_zeros=True)).unconditional()
    assert not zeros.embeddings.any()
    assert not zeros.pooled.any()
    empty = PipelineDenoiser(tiny.stable_diffusion_xl(force_zeros=False)).unconditional()
    assert empty.embeddings.any()
    assert len(empty) == 1


def test_sd3_without_t5():
    denoiser = PipelineDenoiser(tiny.stable_diffusion_3(with_t5=False))
    cond = denoiser.encode(PROMPTS)
    assert len(cond.tokens[0]) == cond.embeddings.shape[1]
    real = sample_for_real(denoiser, PROMPTS, 5.0)
    torch.testing.assert_close(sample(denoiser, PROMPTS, 5.0), real, rtol=1e-4, atol=1e-4)


def test_flux_says_that_its_scores_have_another_scale(caplog):
    denoiser = PipelineDenoiser(tiny.flux())
    assert denoiser.guidance_distilled
    assert denoiser.caveats == (DISTILLED,)
    assert "another scale" in caplog.text
    schnell = PipelineDenoiser(tiny.flux(guidance_embeds=False))  # no guidance input at all
    sample(schnell, PROMPTS, 1.0, steps=1)


def test_resolution_is_asked_for_or_the_models_own():
    pipeline = tiny.stable_diffusion()
    assert PipelineDenoiser(pipeline).latent_shape == (4, 16, 16)
    assert PipelineDenoiser(pipeline, resolution=32).latent_shape == (4, 8, 8)
    with pytest.raises(ValueError, match="multiple of 4 pixels, got 33 x 33"):
        PipelineDenoiser(pipeline, resolution=33)


def test_what_is_not_supported_is_named():
    with pytest.raises(ValueError, match="object is not supported; expected one of Stable"):
        PipelineDenoiser(object())
    pipeline = tiny.stable_diffusion()
    pipeline.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        PipelineDenoiser(pipeline)


def test_a_safety_checker_is_taken_out_and_put_back():
    pipeline = tiny.stable_diffusion()
    checker = torch.nn.Identity()  # would fail if it were called: it is given two arguments
    checker.device = pipeline.device  # as all models of transformers have it
    vars(pipeline)["safety_checker"] = checker
    assert PipelineDenoiser(pipeline).generate(["a cat"], (0,), steps=1)[0].getbbox()
    assert pipeline.safety_checker is checker


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_cuda_gives_the_scores_of_the_cpu(family, dtype):
    scores = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        denoiser = PipelineDenoiser(tiny.PIPELINES[family]().to(device, kind))
        assert denoiser.device.type == device
        sigma = denoiser.sigmas(STEPS)[0]
        noise = PipelineDenoiser(tiny.PIPELINES[family]()).initial_noise(SEEDS, sigma)
        cond, uncond = denoiser.encode(PROMPTS), denoiser.unconditional()[[0, 0]]
        with torch.no_grad():
            x = noise.to(denoiser.device)
            delta = denoiser.denoise(x, sigma, uncond) - denoiser.denoise(x, sigma, cond)
        scores.append((delta / sigma).flatten(1).norm(dim=1).cpu())
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(scores[1], scores[0], rtol=tolerance, atol=0)
