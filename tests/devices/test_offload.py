"""Weights that rest on the CPU: the same numbers, and no more on the GPU than is computed with."""

import pytest
import tiny
import torch
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.offload import enable_offload, is_offloaded, moving_weights
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect

GPU = "cuda:1"
CPU = torch.device("cpu")
SIZE = 32
CONFIG = DetectionConfig(seeds=(0, 1))
PROMPTS = ["a red cat", "a dog"]


def denoiser_of(family: str) -> PipelineDenoiser:
    return PipelineDenoiser(tiny.PIPELINES[family](), resolution=SIZE)


def devices_of(part: torch.nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in part.parameters()}


@pytest.mark.parametrize(
    ("family", "offload"),
    [("sd1", "model"), ("sd1", "sequential"), ("sdxl", "model"), ("sd3", "model"),
     ("flux", "model"), ("flux", "sequential")],
)  # fmt: skip
def test_scores_and_images_are_those_without(foreign, family, offload):
    plain = denoiser_of(family)
    expected = detect(plain, PROMPTS, CONFIG).scores
    latents = torch.randn(1, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    images = plain.decode(latents)
    foreign()
    denoiser = denoiser_of(family)
    assert not is_offloaded(denoiser.pipeline)
    enable_offload(denoiser.pipeline, offload, GPU)
    assert is_offloaded(denoiser.pipeline)
    assert denoiser.device == torch.device(GPU)
    assert torch.equal(detect(denoiser, PROMPTS, CONFIG).scores, expected)
    # The autoencoder rests elsewhere than where it computes.
    made = denoiser.decode(latents)
    assert torch.equal(made.cpu(), images)
    (image,) = denoiser.generate(PROMPTS[:1], [0], steps=2)
    again = denoiser.encode_images([image])
    assert torch.equal(again.cpu(), plain.encode_images([image]))


def test_text_encoders_and_network_are_never_there_together(foreign):
    foreign()
    denoiser = denoiser_of("sdxl")
    pipeline = denoiser.pipeline
    enable_offload(pipeline, "model", GPU)
    encoders, beside = (pipeline.text_encoder, pipeline.text_encoder_2), []

    def watch(*others):
        return lambda *_: beside.append({place for part in others for place in devices_of(part)})

    hooks = [
        pipeline.unet.conv_in.register_forward_pre_hook(watch(*encoders, pipeline.vae)),
        pipeline.vae.decoder.register_forward_pre_hook(watch(*encoders, pipeline.unet)),
        *(encoder.get_input_embeddings().register_forward_pre_hook(
            watch(pipeline.unet, pipeline.vae)) for encoder in encoders),
    ]  # fmt: skip
    for prompt in PROMPTS:  # the second is encoded after the network has run
        detect(denoiser, [prompt], CONFIG)
    denoiser.decode(torch.zeros(1, *denoiser.latent_shape))
    detect(denoiser, PROMPTS, CONFIG)
    assert len(beside) >= 8
    assert all(places == {CPU} for places in beside)
    denoiser.encode(PROMPTS)
    assert all(devices_of(encoder) == {CPU} for encoder in encoders)
    for hook in hooks:
        hook.remove()


def moved(part: torch.nn.Module) -> None:
    """Give the weights other memory, as moving them does, and spoil the old."""
    for parameter in part.parameters():
        parameter.data = torch.full_like(parameter.data, torch.nan)


@pytest.mark.parametrize("offloaded", [True, False])
def test_a_gradient_is_of_the_weights_that_computed(offloaded):
    pipeline = tiny.stable_diffusion()
    layer = pipeline.unet.conv_in
    x = torch.ones(1, 4, 4, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    if offloaded:
        pipeline.enable_model_cpu_offload(device="cpu")
    with moving_weights(pipeline):
        total = layer(x).sum()
    moved(layer)
    (gradient,) = torch.autograd.grad(total, x)
    assert torch.equal(gradient, expected) == offloaded


@pytest.mark.parametrize("offloaded", [True, False])
def test_weights_that_are_moved_while_scoring_stay_differentiable(offloaded):
    """In inference mode they would never be again, and `explain` takes gradients of the same."""
    denoiser = denoiser_of("sd1")
    unet = denoiser.pipeline.unet
    if offloaded:
        denoiser.pipeline.enable_model_cpu_offload(device="cpu")
    unet.conv_in.register_forward_pre_hook(lambda *_: unet.double().float() and None)
    detect(denoiser, PROMPTS, CONFIG)
    assert not offloaded or not any(p.is_inference() for p in unet.parameters())
    assert offloaded or any(p.is_inference() for p in unet.parameters())


def test_layers_in_groups_compute_the_same():
    plain, denoiser = denoiser_of("sd1"), denoiser_of("sd1")
    enable_offload(denoiser.pipeline, "group", "cpu")
    assert is_offloaded(denoiser.pipeline)
    expected = detect(plain, PROMPTS, CONFIG).scores
    assert torch.equal(detect(denoiser, PROMPTS, CONFIG).scores, expected)
    latents = torch.zeros(1, *plain.latent_shape)
    assert torch.equal(denoiser.decode(latents), plain.decode(latents))


def test_a_pipeline_is_known_by_its_weights_wherever_they_rest(foreign):
    foreign()
    denoiser, plain = denoiser_of("sd1"), denoiser_of("sd1")
    enable_offload(denoiser.pipeline, "sequential", GPU)
    assert denoiser.fingerprint == plain.fingerprint
