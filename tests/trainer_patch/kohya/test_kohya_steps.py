"""What a network reads when pictures are looked at in the middle of a step of sd-scripts."""

import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from unmemorize.shared.training.layers.regions import still_noise
from unmemorize.trainer_patch.kohya.adapter import reading
from unmemorize.trainer_patch.kohya.training import Training

SIGMA = 0.5
SCHEDULER = DDPMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
)
LATENTS = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1))
NOISE = still_noise(LATENTS)
GIVEN = torch.zeros_like(LATENTS)


class Network(torch.nn.Module):
    """Returns what it was called with."""

    def forward(self, *args, **kwargs):
        return args, kwargs


class NetworkTrainer:
    """Of SD 1, as sd-scripts calls it."""

    def get_noise_pred_and_target(self):
        pass

    def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, text_conds):
        pass


class FlowTrainer(NetworkTrainer):
    """Of a model whose step is its own."""

    def get_noise_pred_and_target(self):
        pass


def read(trainer, *args, **kwargs):
    """Return what a network reads that a trainer calls with these arguments."""
    accelerator, network = SimpleNamespace(unwrap_model=lambda network: network), Network()
    training = Training(
        trainer=trainer(), args=Namespace(), accelerator=accelerator, text_encoders=[],
        dataset=None, weight_dtype=torch.float32,
    )  # fmt: skip
    with reading(training, {"unet": network, "noise_scheduler": SCHEDULER}, LATENTS, SIGMA):
        seen = network(*args, **kwargs)
    assert network(*args, **kwargs) == (args, kwargs)
    return seen


def test_a_unet_reads_the_noise_level_as_its_schedule_counts_it():
    (noisy, timesteps, text), kwargs = read(NetworkTrainer, GIVEN, torch.tensor([7, 9]), "text")
    assert (text, kwargs) == ("text", {})
    assert timesteps.dtype == torch.long
    assert timesteps[0] == timesteps[1]
    kept = SCHEDULER.alphas_cumprod[timesteps[0]]
    assert float((1 / kept - 1).sqrt()) == pytest.approx(SIGMA, rel=0.01)
    torch.testing.assert_close(noisy, kept.sqrt() * LATENTS + (1 - kept).sqrt() * NOISE)


def test_sd3_reads_a_share_of_noise_and_what_else_it_was_given():
    (noisy, timesteps), kwargs = read(
        FlowTrainer, GIVEN.bfloat16(), torch.tensor([7.0, 9.0]), context="text"
    )
    assert (kwargs, noisy.dtype) == ({"context": "text"}, torch.bfloat16)
    assert timesteps.tolist() == [500.0, 500.0]
    torch.testing.assert_close(noisy, (0.5 * LATENTS + 0.5 * NOISE).bfloat16())


def test_flux_reads_patches_and_the_guidance_that_its_pictures_were_measured_with(monkeypatch):
    library = SimpleNamespace(pack_latents=lambda latents: latents.flatten(2).mT)
    monkeypatch.setitem(sys.modules, "library", SimpleNamespace(flux_utils=library))
    monkeypatch.setitem(sys.modules, "library.flux_utils", library)
    once = torch.ones(2)
    args, seen = read(
        FlowTrainer, img=GIVEN.flatten(2).mT, timesteps=0.2 * once, guidance=once, txt="text"
    )
    assert args == ()
    torch.testing.assert_close(seen["img"], (0.5 * LATENTS + 0.5 * NOISE).flatten(2).mT)
    assert seen["timesteps"].tolist() == [0.5, 0.5]
    assert seen["guidance"].tolist() == [3.5, 3.5]
    assert seen["txt"] == "text"
