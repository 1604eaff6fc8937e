"""Images and latents in the scale the network reads, both ways."""

import numpy as np
import pytest
import tiny
import torch
from unmemorize import demo
from unmemorize.shared.models.autoencoder import decode, encode
from unmemorize.shared.models.load import load_denoiser

CPU = torch.device("cpu")


@pytest.fixture
def vae():
    return tiny.stable_diffusion().vae


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.2},
        {"scaling_factor": 0.2, "shift_factor": 0.7},
        {"scaling_factor": 0.5, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1, 2, 3, 4]},
    ],
)
def test_what_is_read_is_the_mode_less_its_mean_in_units_of_its_deviation(vae, images, config):
    vae.register_to_config(**config)
    mode = vae.encode(images * 2 - 1).latent_dist.mode()
    mean = torch.tensor(config.get("latents_mean") or [config.get("shift_factor", 0.0)] * 4)
    std = torch.tensor(config.get("latents_std") or [1] * 4)
    expected = (mode - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1) * config["scaling_factor"]
    latents = encode(vae, images, CPU)
    torch.testing.assert_close(latents, expected)
    plain = vae.decode(mode, return_dict=False)[0]
    torch.testing.assert_close(decode(vae, latents, CPU), (plain / 2 + 0.5).clamp(0, 1))


def test_the_tiny_autoencoder_gives_its_latents_as_they_are(images):
    vae = tiny.tiny_autoencoder()
    latents = encode(vae, images, CPU)
    torch.testing.assert_close(latents, vae.encode(images * 2 - 1).latents)
    assert latents.shape == (2, 4, 8, 8)
    plain = vae.decode(latents, return_dict=False)[0]
    torch.testing.assert_close(decode(vae, latents, CPU), (plain / 2 + 0.5).clamp(0, 1))


def test_half_precision_that_overflows_is_avoided_and_put_back(vae, images):
    vae.register_to_config(force_upcast=True)
    expected = encode(vae, images, CPU)
    vae.to(torch.float16)
    torch.testing.assert_close(encode(vae, images, CPU), expected, rtol=0, atol=5e-3)
    assert vae.dtype == torch.float16


def test_a_picture_comes_back_from_its_latents():
    denoiser = load_denoiser(demo.MODEL)
    captions = [c.text for c in demo.captions() if c.group == "verbatim"][:2]
    pictures = [demo.training_image(caption) for caption in captions]
    latents = denoiser.encode_images([pictures[0].resize((200, 200)), pictures[1]])
    assert latents.shape == (2, *denoiser.latent_shape)
    own, other = (torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures)
    back = denoiser.decode(latents)
    assert (back[0] - own).abs().mean() < 0.4 * (back[0] - other).abs().mean()
