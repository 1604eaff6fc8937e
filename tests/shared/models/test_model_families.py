"""Every declared family follows its pipeline: real classes at tiny size, against their own run."""

import pytest
import tiny
import tiny_families
import torch
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models import checks
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.calls.hold import accepted
from unmemorize.shared.models.families import FAMILIES, family_of
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.sampling.observer import observe
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect

NEW = {**tiny_families.IMAGES, **tiny_families.VIDEOS}
PROMPT, LONGER = "a red cat", "a tall tree on the mat and a green house with the sea"
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module", params=NEW)
def denoiser(request):
    frames = tiny_families.FRAMES if request.param in tiny_families.VIDEOS else None
    return PipelineDenoiser(NEW[request.param](), resolution=tiny.RESOLUTION, frames=frames)


class Stepped(BaseException):
    """The pipeline's first step."""


def first_step(denoiser, prompt: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents, prediction and time that the pipeline's own run gives its scheduler.

    Guidance is off; the scheduler is the one of the noise levels that scores are measured at.
    """
    pipeline, family = denoiser.pipeline, denoiser.family
    scheduler, own, seen = family._scheduler(), pipeline.scheduler, []

    def step(output, timestep, sample, *_, **__):
        seen.append((sample, output, torch.as_tensor(float(timestep))))
        raise Stepped

    scheduler.step = step
    given = family._arguments() | {
        "prompt": [prompt], "num_inference_steps": 50, "output_type": "latent",
        "generator": [torch.Generator("cpu").manual_seed(3)],
    }  # fmt: skip
    guider = vars(pipeline).pop("guider", None), vars(pipeline).pop("ocr_guider", None)
    try:
        vars(pipeline).update(scheduler=scheduler, guider=None, ocr_guider=None)
        with pytest.raises(Stepped):
            pipeline(**accepted(pipeline, given))
    finally:
        vars(pipeline).update(scheduler=own, guider=guider[0], ocr_guider=guider[1])
    sample, output, time = seen[0]
    if family.packed:
        sample, output = family.unpack(sample), family.unpack(output)
    return sample, output, time


@torch.no_grad()
def test_zero_change_is_the_pipelines_own_prediction_bit_for_bit(denoiser):
    family = denoiser.family
    x, expected, time = first_step(denoiser, PROMPT)
    own = family.predict(x.to(denoiser.dtype), time, denoiser.encode([PROMPT]))
    assert torch.equal(own, expected.to(own.dtype))
    empty = family.predict(x.to(denoiser.dtype), time, denoiser.unconditional())
    assert (empty - own).abs().max() > 1e-5  # the text decides, the case is not trivial
    assert tuple(x.shape[1:]) == denoiser.latent_shape
    sigma = denoiser.sigmas(50)[0]
    noise = denoiser.initial_noise([3], sigma) / denoiser.schedule.latent_scale(float(sigma))
    torch.testing.assert_close(noise, x.float(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_prompts_of_any_length_share_a_batch_and_keep_their_predictions(denoiser):
    sigma = denoiser.sigmas(10)[1]
    x = denoiser.initial_noise((0, 1, 2), sigma)
    prompts = [PROMPT, LONGER, ""]
    together = denoiser.denoise(x, sigma, denoiser.encode(prompts))
    alone = [denoiser.denoise(x[[i]], sigma, denoiser.encode([p])) for i, p in enumerate(prompts)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_score_costs_its_rows_and_nothing_more(denoiser):
    """The call is held and not made: building, encoding and levels call no network."""
    rows, family = [], denoiser.family

    def count(network, args, kwargs, output):
        rows.append(len(family.call(args, kwargs).latents))

    hook = family.network.register_forward_hook(count, with_kwargs=True)
    try:
        fresh = PipelineDenoiser(
            denoiser.pipeline, resolution=tiny.RESOLUTION, frames=denoiser.family.frames
        )
        fresh.encode([PROMPT, LONGER])
        fresh.sigmas(50)
        assert rows == []
        found = detect(fresh, [PROMPT, LONGER, "a dog"], DetectionConfig(seeds=(0, 1)))
    finally:
        hook.remove()
    assert sum(rows) == 2 + 3 * 2
    assert len(fresh.family._held) <= 2  # once per size, and once for the first time of a run
    assert torch.isfinite(found.scores).all()
    assert len({round(float(score), 8) for score in found.scores}) == 3


def test_decoding_is_that_of_the_pipeline(denoiser):
    latents = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    images = denoiser.decode(latents)
    assert torch.isfinite(images).all()
    assert images.shape[1] == 3
    assert tuple(images.shape[-2:]) == denoiser.resolution
    assert (images.ndim == 5) == (len(denoiser.latent_shape) == 4)
    assert images.std() > 0


def guided(denoiser) -> dict:
    """Return the arguments of a guided run of two images."""
    family = denoiser.family
    given = family._arguments() | {
        "num_inference_steps": 2, "output_type": "latent", "prompt": [PROMPT, LONGER],
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in (0, 1)],
    }  # fmt: skip
    guidance = family.guidance
    if guidance.scale and guidance.scale != "distilled_guidance_scale":
        given[guidance.scale] = 3.0
    if guidance.negative:
        given["negative_prompt"] = ["", ""]
    return accepted(denoiser.pipeline, given)


def latents_of(output) -> torch.Tensor:
    return output.images if hasattr(output, "images") else output.frames


@torch.no_grad()
def test_an_observer_reads_the_score_of_the_denoiser_and_changes_nothing(denoiser):
    pipeline = denoiser.pipeline
    plain = latents_of(pipeline(**guided(denoiser)))
    with observe(pipeline) as record:
        observed = latents_of(pipeline(**guided(denoiser)))
    assert torch.equal(plain, observed)
    (run,) = record.runs
    if not denoiser.family.guidance.scale:
        assert "takes no negative prompt" in run.reason
        return
    assert run.measurable, run.reason
    assert run.comparable
    assert run.prompts == (PROMPT, LONGER)
    sigma = torch.tensor(
        denoiser.schedule.sigma(denoiser.family.training_timestep(run.timesteps[0]))
    )
    x = denoiser.initial_noise((0, 1), sigma)
    texts = (denoiser.unconditional()[[0, 0]], denoiser.encode([PROMPT, LONGER]))
    rows = [denoiser.denoise(x, sigma, text) for text in texts]
    expected = ((rows[0] - rows[1]) / sigma).flatten(1).norm(dim=1)
    torch.testing.assert_close(run.l2[:, 0].float(), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["z_image", "chroma", "wan"])
def test_a_saved_pipeline_loads_as_it_was(name, tmp_path):
    pipeline = NEW[name]()
    pipeline.save_pretrained(tmp_path)
    frames = tiny_families.FRAMES if name in tiny_families.VIDEOS else None
    own = PipelineDenoiser(pipeline, resolution=tiny.RESOLUTION, frames=frames)
    loaded = load_denoiser(tmp_path, device="cpu", resolution=tiny.RESOLUTION, frames=frames)
    sigma = own.sigmas(10)[1]
    x = own.initial_noise((0,), sigma)
    with torch.no_grad():
        predicted = [d.denoise(x, sigma, d.encode([PROMPT])) for d in (own, loaded)]
    # The weights are equal bit for bit; where they lie in memory moves roundings.
    torch.testing.assert_close(*predicted, rtol=1e-4, atol=1e-6)


def test_a_clip_too_long_for_the_memory_says_how_many_frames_fit(monkeypatch):
    pipeline = tiny_families.wan()
    row = 4 * 8 * 8 * 4 * checks.ROW_MEMORY  # of one frame of the latent
    monkeypatch.setattr(checks, "available_memory", lambda device: 2 * row)
    with pytest.raises(ModelError, match=r"A clip of 9 frames needs about .*about 5 fit"):
        _ = PipelineDenoiser(pipeline, resolution=tiny.RESOLUTION, frames=9).latent_shape
    assert PipelineDenoiser(pipeline, resolution=64, frames=5).latent_shape == (4, 2, 8, 8)


def test_every_class_of_the_issue_is_declared():
    assert len(FAMILIES) >= 22
    assert {family_of(make()).__name__ for make in (tiny.flux, tiny.stable_diffusion)} == {
        "Flux", "StableDiffusion"
    }  # fmt: skip
