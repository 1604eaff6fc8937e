"""Stable Diffusion 1.x, 2.x and XL."""

from typing import Any, ClassVar

import torch

from .family import Family


class StableDiffusion(Family):
    """A U-Net; one CLIP encoder, no pooled text."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    checkpoints: ClassVar[tuple[str, ...]] = ("v1", "v2")
    network_name = "unet"
    one_by_one = False
    negatives_as_prompts = True
    half_precision = torch.float16

    def readers(self) -> list[tuple[Any, int]]:
        return [(self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length)]

    def _check(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.network.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "The network reads a guidance scale (a latent-consistency model): it has no "
                "unconditional branch to compare with. Give the model it was distilled from."
            )
        return super()._check(size)


class StableDiffusionXL(StableDiffusion):
    """Two CLIP encoders side by side, pooled text of the second, sizes as time ids."""

    pipelines = ("StableDiffusionXLPipeline",)
    checkpoints = ("xl",)

    @property
    def zero_unconditional(self) -> bool:
        """Whether the pipeline replaces an absent negative prompt by zeros."""
        return bool(self.pipeline.config.get("force_zeros_for_empty_prompt", True))

    def readers(self) -> list[tuple[Any, int]]:
        """Return the first tokenizer; the second cuts text in the same way."""
        tokenizer = self.pipeline.tokenizer or self.pipeline.tokenizer_2
        return [(tokenizer, tokenizer.model_max_length)]
