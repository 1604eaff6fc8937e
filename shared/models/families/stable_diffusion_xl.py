"""Stable Diffusion XL."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...score.denoiser import Conditioning
from .stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Two CLIP encoders side by side, pooled text of the second, sizes as time ids."""

    pipelines = ("StableDiffusionXLPipeline",)
    checkpoints = ("xl",)

    @property
    def zero_unconditional(self) -> bool:
        """Whether the pipeline replaces an absent negative prompt by zeros."""
        return bool(self.pipeline.config.get("force_zeros_for_empty_prompt", True))

    @staticmethod
    def lora_options(pipeline: Any) -> dict[str, Any]:
        """Return the configuration by which the blocks of Stability's names are counted."""
        return {"unet_config": pipeline.unet.config}

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.pipeline._execution_device, do_classifier_free_guidance=False
        )
        return embeddings, pooled

    def readers(self) -> list[tuple[Any, int]]:
        """Return the first tokenizer; the second cuts text in the same way."""
        tokenizer = self.pipeline.tokenizer or self.pipeline.tokenizer_2
        return [(tokenizer, tokenizer.model_max_length)]

    def predict(self, latents: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        size = self.height, self.width
        assert cond.pooled is not None
        time_ids = self.pipeline._get_add_time_ids(
            size, (0, 0), size, dtype=cond.embeddings.dtype,
            text_encoder_projection_dim=cond.pooled.shape[-1],
        )  # fmt: skip
        added = {
            "text_embeds": cond.pooled,
            "time_ids": time_ids.to(latents.device).repeat(len(latents), 1),
        }
        return self.network(
            latents,
            timestep,
            encoder_hidden_states=cond.embeddings,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
