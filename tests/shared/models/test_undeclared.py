"""Pipelines that no family declares: tried and right, or refused with what to load instead."""

import diffusers
import pytest
import tiny
import tiny_families
import torch
from unmemorize.shared.models import families
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.families.undeclared import instead, refusal

DECLARED = {**tiny.PIPELINES, **tiny_families.IMAGES, **tiny_families.VIDEOS}
REFUSED = {
    "qwen_image": "no finite image|fails for a prompt alone",
    "z_image": "its network reads latents of shape",
    "flux2": "nothing unpacks|fails for a prompt alone",
    "flux2_klein": "nothing unpacks|fails for a prompt alone",
    "flux_kontext": "makes images of 1024 x 1024 pixels in place of",
    "ernie_image": "inpainting or editing",
    "ltx": "fails for a prompt alone",
    "hunyuan_image": "comes out differently",
}
"""Families that only a declaration makes work; all others are followed without one."""
PROMPTS = ["a red cat", "a tall tree"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@torch.no_grad()
def predictions(pipeline) -> torch.Tensor:
    frames = tiny_families.FRAMES if hasattr(pipeline, "video_processor") else None
    denoiser = PipelineDenoiser(pipeline, resolution=tiny.RESOLUTION, frames=frames)
    sigma = denoiser.sigmas(10)[2]
    x = denoiser.initial_noise((0, 1), sigma)
    return denoiser.denoise(x, sigma, denoiser.encode(PROMPTS))


@pytest.mark.parametrize("name", DECLARED)
def test_a_trial_agrees_with_the_declaration_or_is_refused(name, monkeypatch):
    pipeline = DECLARED[name]()
    expected = predictions(pipeline)
    guidance = families.family_of(pipeline).guidance
    monkeypatch.setattr(families, "FAMILIES", {})
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]) as refused:
            predictions(pipeline)
        assert "was tried as a text-to-image pipeline" in str(refused.value)
        return
    # Prompts encoded one by one and together differ by roundings.
    torch.testing.assert_close(predictions(pipeline), expected, rtol=1e-3, atol=1e-4)
    tried = families.family_of(pipeline).guidance
    assert (tried.calls, tried.prompt_first) == (guidance.calls, guidance.prompt_first)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("StableDiffusionImg2ImgPipeline", ["`strength`", "diffusers.StableDiffusionPipeline"]),
        ("StableDiffusionXLImg2ImgPipeline", ["diffusers.StableDiffusionXLPipeline"]),
        ("StableDiffusionInpaintPipeline", ["`mask_image`", "diffusers.StableDiffusionPipeline"]),
        ("FluxImg2ImgPipeline", ["diffusers.FluxPipeline"]),
        ("QwenImageInpaintPipeline", ["diffusers.QwenImagePipeline"]),
        ("DDPMPipeline", ["no prompt", "not text-to-image"]),
        ("DiTPipeline", ["no prompt"]),
    ],
)
def test_what_needs_more_than_a_prompt_is_refused_with_what_to_load(name, words):
    reason = refusal(getattr(diffusers, name))
    for word in words:
        assert word in reason
    assert refusal(diffusers.StableDiffusionPipeline) == ""


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("QwenImageEditPlusPipeline", "QwenImagePipeline"),
        ("FluxFillPipeline", "FluxPipeline"),
        ("WanImageToVideoPipeline", "WanPipeline"),
        ("StableDiffusionXLControlNetPipeline", "StableDiffusionXLPipeline"),
        ("StableDiffusionUpscalePipeline", "StableDiffusionPipeline"),
    ],
)
def test_the_pipeline_to_load_is_found_by_name(name, base):
    assert instead(getattr(diffusers, name)) == f"Load the same files as a diffusers.{base}."


def test_an_editing_pipeline_is_refused_before_it_runs():
    base = tiny.stable_diffusion()
    editing = diffusers.StableDiffusionImg2ImgPipeline(
        **base.components, requires_safety_checker=False
    )
    with pytest.raises(ValueError, match=r"needs `strength`.*StableDiffusionPipeline"):
        PipelineDenoiser(editing)


def test_a_pipeline_is_left_as_it_was_by_a_trial(monkeypatch):
    pipeline = tiny_families.cogview4()
    before = dict(vars(pipeline))
    monkeypatch.setattr(families, "FAMILIES", {})
    PipelineDenoiser(pipeline, resolution=tiny.RESOLUTION)
    assert vars(pipeline) == before
    assert not pipeline.transformer._forward_hooks
    assert not pipeline.transformer._forward_pre_hooks
