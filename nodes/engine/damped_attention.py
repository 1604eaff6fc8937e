"""Attraction-repulsion on ComfyUI's U-Nets, whose attention is replaced call by call."""

from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...shared.arrays import Float, Tensor
from ...shared.mitigation.attention import AttractionRepulsion, TwoForces, damping
from ...shared.mitigation.method import Start

PARTS = {"early": ("input", "middle"), "all": ("input", "middle", "output")}
"""ComfyUI's names of a U-Net's parts by the setting's value."""


class ComfyAttractionRepulsion(AttractionRepulsion):
    """The method where attention is damped by transformer options."""

    def start(self, start: Start) -> "ComfyTwoForces":
        """Return the two forces on one run.

        Raises:
            ValueError: The network is no U-Net with cross-attention.
        """
        if not isinstance(start.network, UNetModel):
            raise ValueError(
                "The method attention works on U-Nets with cross-attention, which are Stable "
                f"Diffusion 1, 2 and XL; this is {type(start.network).__name__}. Choose another."
            )
        return ComfyTwoForces(self, start.network)


class ComfyTwoForces(TwoForces):
    """Attraction and repulsion in one run; the extra pass must be given `damped` options."""

    def __init__(self, settings: AttractionRepulsion, network: UNetModel):
        super().__init__(settings, modules=[])
        blocks = {
            "input": len(network.input_blocks), "middle": 1, "output": len(network.output_blocks)
        }  # fmt: skip
        self.places = {
            (part, number) for part in PARTS[settings.blocks] for number in range(blocks[part])
        }

    def damped(self, options: dict) -> dict:
        """Return a copy of model options in which spiking cross-attention is damped.

        Raises:
            ValueError: Something else replaces this attention already.
        """
        transformer = options.get("transformer_options", {})
        replaced = transformer.get("patches_replace", {})
        others = replaced.get("attn2", {})
        if self.places & {place[:2] for place in others}:
            raise ValueError(
                "Another node replaces the cross-attention that the method attention damps (an "
                "IP-Adapter, for instance): remove it, or choose another method."
            )
        attention = partial(_attention, alpha=self.settings.alpha, tau=self.settings.tau)
        ours = others | dict.fromkeys(self.places, attention)
        return options | {
            "transformer_options": transformer | {"patches_replace": replaced | {"attn2": ours}}
        }


def _attention(
    query: Float[Tensor, " row place width"],
    key: Float[Tensor, " row token width"],
    value: Float[Tensor, " row token width"],
    extra_options: dict[str, Any],
    *,
    alpha: float,
    tau: float,
) -> Float[Tensor, " row place width"]:
    """Return cross-attention with damped logits, with the signature of ComfyUI's replacements."""
    heads, rows = extra_options["n_heads"], len(query)
    wide = torch.promote_types(query.dtype, torch.float32)
    queries, keys = (
        part.to(wide).unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)
        for part in (query, key)
    )
    logits = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
    mask = damping(logits, alpha, tau).unflatten(0, (rows, heads)).to(query.dtype)
    return optimized_attention(query, key, value, heads, mask=mask)
