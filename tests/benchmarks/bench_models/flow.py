"""A rectified-flow transformer of Stable Diffusion 3's class (Esser et al. 2024, 2403.03206)."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from unmemorize.demo.denoiser import FLOW_SHIFT, FrozenText
from unmemorize.demo.networks import text_config
from unmemorize.demo.transformer import WeightedLastToken, padded_flow_loss, start_at_zero

LATENT_SIDE = 8


class TwoEncoders(nn.Module):
    """CLIP encoders side by side, as the pipeline joins them."""

    scale = 1.0
    """What states are divided by: before the last normalisation their size is an accident."""

    def __init__(self, encoders: list[nn.Module]):
        """Read with `CLIPTextModelWithProjection`s."""
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        """Return the last but one states of both [row token width], and both ends [row width]."""
        read = [encoder(tokens, output_hidden_states=True) for encoder in self.encoders]
        return SimpleNamespace(
            last_hidden_state=torch.cat([each.hidden_states[-2] for each in read], -1) / self.scale,
            pooler_output=torch.cat([each.text_embeds for each in read], -1),
        )


@dataclass(frozen=True, kw_only=True)
class FlowShape:
    """What distinguishes one transformer and its text encoders from another."""

    width: int
    layers: int
    heads: int
    latent_channels: int
    text_widths: tuple[int, int]
    text_layers: tuple[int, int]
    tokens: int

    def build(self, vocabulary: int) -> "Flow":
        """Return the networks with random weights."""
        return Flow(self, vocabulary)


class Flow:
    """Text encoders and transformer of one model."""

    def __init__(self, shape: FlowShape, vocabulary: int):
        """Start with random weights; what an encoder trained ends with is its pooled text."""
        from diffusers import SD3Transformer2DModel
        from transformers import CLIPTextModelWithProjection

        encoders = []
        for width, layers in zip(shape.text_widths, shape.text_layers, strict=True):
            config = text_config(vocabulary, width, layers, shape.tokens)
            config.architectures = ["CLIPTextModelWithProjection"]
            encoders.append(encoder := CLIPTextModelWithProjection(config))
            nn.init.eye_(encoder.text_projection.weight)
        self.text: nn.Module = TwoEncoders(encoders)
        self.text_encoders = [encoder.text_model for encoder in encoders]
        self.loss = padded_flow_loss
        self.network: nn.Module = SD3Transformer2DModel(
            sample_size=LATENT_SIDE, patch_size=1, in_channels=shape.latent_channels,
            out_channels=shape.latent_channels, num_layers=shape.layers,
            attention_head_dim=shape.width // shape.heads, num_attention_heads=shape.heads,
            joint_attention_dim=sum(shape.text_widths), caption_projection_dim=shape.width,
            pooled_projection_dim=sum(shape.text_widths), pos_embed_max_size=LATENT_SIDE,
        )  # fmt: skip
        self.network.set_attn_processor(WeightedLastToken())
        start_at_zero(self.network)

    def freeze(self, tokens: Tensor) -> FrozenText:
        """Return what the trained encoders make of the captions [caption + 1, token]."""
        text = FrozenText(self.text, tokens)
        self.text.scale = text.states.square().mean().sqrt().item()
        text.states /= self.text.scale
        return text

    def save(self, folder: Path, autoencoder: nn.Module, network: nn.Module, tokenizer) -> None:
        """Write a diffusers folder; read from there, the network meets all tokens of zeros.

        It reads the states as they are, since its first layer takes the scale.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        network.context_embedder.weight.data /= self.text.scale
        autoencoder.register_to_config(shift_factor=0.0)  # the pipeline adds it
        first, second = self.text.encoders
        StableDiffusion3Pipeline(
            vae=autoencoder, text_encoder=first, text_encoder_2=second, text_encoder_3=None,
            tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=None, transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        ).save_pretrained(folder)  # fmt: skip
