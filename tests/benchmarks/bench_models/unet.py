"""U-Nets of Stable Diffusion's class that predict noise or velocity."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from unmemorize.demo.denoiser import FrozenText, cumulative_alphas, noise_loss
from unmemorize.demo.networks import build_scheduler, predict_input, start_as_identity, text_config

LATENT_SIDE = 8


def velocity_loss(
    unet: nn.Module, x0: Tensor, states: Tensor, ends: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the loss of v-prediction (Salimans & Ho 2022, 2202.00512); `ends` are not read."""
    alphas = cumulative_alphas()
    timestep = torch.randint(0, len(alphas), (len(x0),), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    abar = alphas[timestep][:, None, None, None]
    noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * x0
    return (unet(noisy, timestep, states).sample - velocity).square().mean()


@dataclass(frozen=True, kw_only=True)
class UNetShape:
    """What distinguishes one U-Net and its text encoder from another."""

    prediction_type: str
    channels: tuple[int, ...]
    """Of each level; all but the last level attend to the text."""
    layers: int
    heads: int
    latent_channels: int
    text_width: int
    text_layers: int
    tokens: int
    linear: bool
    """Attention's projections are matrices, as in Stable Diffusion 2, and not convolutions."""

    def build(self, vocabulary: int) -> "UNet":
        """Return the networks with random weights."""
        return UNet(self, vocabulary)


class UNet:
    """Text encoder and U-Net of one model."""

    def __init__(self, shape: UNetShape, vocabulary: int):
        """Start with random weights."""
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        self.shape, attending = shape, len(shape.channels) - 1
        config = text_config(vocabulary, shape.text_width, shape.text_layers, shape.tokens)
        self.text: nn.Module = CLIPTextModel(config)
        self.text_encoders = [self.text]
        self.network: nn.Module = UNet2DConditionModel(
            sample_size=LATENT_SIDE, block_out_channels=shape.channels,
            in_channels=shape.latent_channels, out_channels=shape.latent_channels,
            down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
            layers_per_block=shape.layers, cross_attention_dim=shape.text_width,
            attention_head_dim=shape.heads, norm_num_groups=32,
            use_linear_projection=shape.linear,
        )  # fmt: skip
        start_as_identity(self.network)
        if shape.prediction_type == "epsilon":
            predict_input(self.network)
            self.loss = noise_loss
        else:
            nn.init.zeros_(self.network.conv_out.weight)
            self.loss = velocity_loss
        self.network.to(memory_format=torch.channels_last)

    def freeze(self, tokens: Tensor) -> FrozenText:
        """Return what the trained encoder makes of the captions [caption + 1, token]."""
        return FrozenText(self.text, tokens)

    def save(self, folder: Path, autoencoder: nn.Module, network: nn.Module, tokenizer) -> None:
        """Write a diffusers folder."""
        from diffusers import StableDiffusionPipeline

        StableDiffusionPipeline(
            vae=autoencoder, text_encoder=self.text, tokenizer=tokenizer, unet=network,
            scheduler=build_scheduler(self.shape.prediction_type), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(folder)  # fmt: skip
