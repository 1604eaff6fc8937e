"""Stable Diffusion 1.x and 2.x."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ...score.denoiser import Conditioning
from .family import Family


class StableDiffusion(Family):
    """One CLIP encoder, last layer, no pooled text."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    checkpoints: ClassVar[tuple[str, ...]] = ("v1", "v2")

    def _check(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.network.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "The network reads a guidance scale (a latent-consistency model): it has no "
                "unconditional branch to compare with. Give the model it was distilled from."
            )
        return super()._check(size)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        device = self.pipeline._execution_device
        return self.pipeline.encode_prompt(list(prompts), device, 1, False)[0], None

    def predict(self, latents: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return self.network(
            latents, timestep, encoder_hidden_states=cond.embeddings, return_dict=False
        )[0]
