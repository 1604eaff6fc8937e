"""Flux.1."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...score.denoiser import Conditioning
from .family import FlowFamily


class Flux(FlowFamily):
    """Packed latents, T5 tokens, CLIP's pooled text, guidance distilled into the network."""

    pipelines = ("FluxPipeline",)
    guidance_distilled = True
    timestep_unit = 1000.0
    t5_length = 512
    max_shift = 1.15
    from_one = True
    guidance_embedding: float = 3.5  # the pipeline's default

    @property
    def channels(self) -> int:
        """Channels of one unpacked latent; the network reads 2 x 2 patches."""
        return self.network.config.in_channels // 4

    @property
    def multiple(self) -> int:
        return self.pipeline.vae_scale_factor * 2

    def _pixels(self) -> tuple[int, int]:
        return (self.pipeline.default_sample_size * self.pipeline.vae_scale_factor,) * 2

    @staticmethod
    def lora_options(pipeline: Any) -> dict[str, Any]:
        """Return that the scales are to be returned beside the factors."""
        return {"return_alphas": True}

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        embeddings, pooled, _ = self.pipeline.encode_prompt(list(prompts), None)
        return embeddings, pooled

    def readers(self) -> list[tuple[Any, int]]:
        """Return T5's tokenizer: the embeddings hold no CLIP tokens."""
        return [(self.pipeline.tokenizer_2, self.t5_length)]

    def pack(self, latents: Tensor) -> Tensor:
        """Return 2 x 2 patches [row patch value] of latents [row *latent]."""
        return self.pipeline._pack_latents(latents, *latents.shape)

    def unpack(self, packed: Tensor) -> Tensor:
        """Return latents [row *latent] of patches [row patch value]."""
        pipeline = self.pipeline
        return pipeline._unpack_latents(packed, self.height, self.width, pipeline.vae_scale_factor)

    def predict(self, latents: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        rows, _, height, width = latents.shape
        device, dtype = latents.device, latents.dtype
        pipeline, guided = self.pipeline, self.network.config.guidance_embeds
        ids = pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, device, dtype)
        guidance = torch.full([rows], self.guidance_embedding, device=device) if guided else None
        output = self.network(
            hidden_states=self.pack(latents),
            timestep=timestep.expand(rows).to(dtype) / self.timestep_unit,
            guidance=guidance,
            pooled_projections=cond.pooled,
            encoder_hidden_states=cond.embeddings,
            txt_ids=torch.zeros(cond.embeddings.shape[1], 3, device=device, dtype=dtype),
            img_ids=ids,
            return_dict=False,
        )[0]
        return self.unpack(output)
