"""The network of demo-flow: Stable Diffusion 3's class, 128 wide (Esser et al., 2403.03206)."""

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import RESOLUTION
from .denoiser import flow_loss

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


class TwiceRead(nn.Module):
    """One CLIP encoder in both places of the pipeline, which joins what they return."""

    scale = 1.0
    """What states are divided by: before the last normalisation their size is an accident."""

    def __init__(self, encoder: nn.Module):
        """Read with a `CLIPTextModel`."""
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        """Return the last but one states [row token 2 width], and ends [row 2 width]."""
        read = self.encoder(tokens, output_hidden_states=True)
        return SimpleNamespace(
            last_hidden_state=torch.cat([read.hidden_states[-2]] * 2, -1) / self.scale,
            pooler_output=torch.cat([read.pooler_output] * 2, -1),
        )


def padded_flow_loss(
    transformer: nn.Module, x0: Tensor, states: Tensor, ends: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the loss of a rectified flow, with one token of zeros after the text."""
    return flow_loss(transformer, x0, F.pad(states, (0, 0, 0, 1)), ends, generator)


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


def build_transformer(width: int) -> nn.Module:
    """Return demo-flow's network with random weights; it reads an encoder of `width` twice."""
    from diffusers import SD3Transformer2DModel

    side, patch = RESOLUTION // 8, 2
    transformer = SD3Transformer2DModel(
        sample_size=side, patch_size=patch, in_channels=4, out_channels=4, num_layers=5,
        attention_head_dim=32, num_attention_heads=4, joint_attention_dim=2 * width,
        caption_projection_dim=128, pooled_projection_dim=2 * width,
        pos_embed_max_size=side // patch,
    )  # fmt: skip
    start_at_zero(transformer)
    return transformer
