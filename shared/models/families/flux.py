"""Flux.1."""

from typing import Any

from .family import Family, Guidance


class Flux(Family):
    """Packed latents, T5 tokens, CLIP's pooled text, guidance distilled into the network."""

    pipelines = ("FluxPipeline",)
    guidance = Guidance(calls=2, scale="true_cfg_scale", negative=True)
    guidance_distilled = True
    guidance_embedding: float = 3.5  # the pipeline's default
    timestep_unit = 1000.0
    one_by_one = False
    negatives_as_prompts = True
    t5_length = 512
    packed = True
    patch = 2

    def readers(self) -> list[tuple[Any, int]]:
        """Return T5's tokenizer: the embeddings hold no CLIP tokens."""
        return [(self.pipeline.tokenizer_2, self.t5_length)]
