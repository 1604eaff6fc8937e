"""A rectified-flow transformer of Stable Diffusion 3's class (Esser et al. 2024, 2403.03206)."""

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from unmemorize.demo.denoiser import FrozenText, flow_loss
from unmemorize.demo.networks import text_config

LATENT_SIDE = 8
ZEROS = 256
"""Tokens of zeros that the pipeline appends in place of T5's."""


class WeightedLastToken:
    """Joint attention that counts its last token `ZEROS` times.

    The transformer gives text no positions, so tokens of zeros stay alike in every layer, and one
    that is attended to with so many times the weight does exactly what all of them do.
    """

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, **_):
        """Return image [row token width] and text [row token width] after attention."""
        kinds = ((attn.to_q, attn.add_q_proj), (attn.to_k, attn.add_k_proj),
                 (attn.to_v, attn.add_v_proj))  # fmt: skip
        query, key, value = (
            torch.cat([of_image(hidden_states), of_text(encoder_hidden_states)], 1)
            .unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for of_image, of_text in kinds
        )  # fmt: skip
        bias = torch.zeros(1, 1, 1, key.shape[2], dtype=query.dtype)
        bias[..., -1] = math.log(ZEROS)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out = out.transpose(1, 2).flatten(2)
        image, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


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


def padded_flow_loss(
    transformer: nn.Module, x0: Tensor, states: Tensor, ends: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the loss of a rectified flow, with one token of zeros after the text."""
    return flow_loss(transformer, x0, F.pad(states, (0, 0, 0, 1)), ends, generator)


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
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        ).save_pretrained(folder)  # fmt: skip


@torch.no_grad()
def start_at_zero(transformer: nn.Module) -> None:
    """Let every block begin as identity and the output at zero (Peebles & Xie 2023, DiT)."""
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            norm.linear.weight.zero_()
            norm.linear.bias.zero_()
    for layer in (transformer.norm_out.linear, transformer.proj_out):
        layer.weight.zero_()
        layer.bias.zero_()
