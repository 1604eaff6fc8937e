"""Stable Diffusion 3 and 3.5."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...score.denoiser import Conditioning
from .family import FlowFamily


class StableDiffusion3(FlowFamily):
    """Two CLIP encoders side by side, then T5's tokens or zeros."""

    pipelines = ("StableDiffusion3Pipeline",)
    checkpoints = ("sd3",)
    t5_length = 256
    max_shift = 1.16

    @property
    def multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.network.config.patch_size

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False
        )
        return embeddings, pooled

    def readers(self) -> list[tuple[Any, int]]:
        """Return CLIP's tokenizer and T5's, None for the latter when T5 was left out."""
        pipeline = self.pipeline
        t5 = None if pipeline.text_encoder_3 is None else pipeline.tokenizer_3
        return [(pipeline.tokenizer, pipeline.tokenizer_max_length), (t5, self.t5_length)]

    def predict(self, latents: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return self.network(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=cond.embeddings,
            pooled_projections=cond.pooled,
            return_dict=False,
        )[0]
