"""Stable Diffusion 3 and 3.5."""

from typing import Any

from .family import Family


class StableDiffusion3(Family):
    """Two CLIP encoders side by side, then T5's tokens or zeros."""

    pipelines = ("StableDiffusion3Pipeline",)
    checkpoints = ("sd3",)
    one_by_one = False
    negatives_as_prompts = True
    t5_length = 256

    @property
    def multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.network.config.patch_size

    def readers(self) -> list[tuple[Any, int]]:
        """Return CLIP's tokenizer and T5's, None for the latter when T5 was left out."""
        pipeline = self.pipeline
        t5 = None if pipeline.text_encoder_3 is None else pipeline.tokenizer_3
        return [(pipeline.tokenizer, pipeline.tokenizer_max_length), (t5, self.t5_length)]
