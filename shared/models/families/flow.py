"""How pipelines of SD3 and Flux read prompts and call their network; and which family is whose."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...score.denoiser import Conditioning, Parametrization
from ..schedules import FlowSchedule, Schedule
from .stable_diffusion import Family, StableDiffusion, StableDiffusionXL


class StableDiffusion3(Family):
    """SD3: flow matching; two CLIP encoders side by side, then T5's tokens or zeros."""

    network_name = "transformer"
    t5_length: ClassVar[int] = 256
    """The pipeline's own default for `max_sequence_length`."""
    max_shift: ClassVar[float] = 1.16
    from_one: ClassVar[bool] = False

    @property
    def multiple(self) -> int:
        """Pixels that height and width must be multiples of."""
        return self.pipeline.vae_scale_factor * self.network.config.patch_size

    def parametrization(self) -> Parametrization:
        """Return "flow"."""
        return "flow"

    def schedule(self) -> Schedule:
        """Return the noise levels of this model at this resolution."""
        tokens = self.height * self.width // self.multiple**2
        return FlowSchedule(
            self.pipeline.scheduler.config,
            image_tokens=tokens,
            max_shift=self.max_shift,
            from_one=self.from_one,
        )

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Return embeddings [prompt token width] and pooled [prompt pooled_width]."""
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
        """Return velocity [row *latent]."""
        return self.network(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=cond.embeddings,
            pooled_projections=cond.pooled,
            return_dict=False,
        )[0]


class Flux(StableDiffusion3):
    """Flux: packed latents, T5 tokens, CLIP's pooled text, guidance distilled into the network."""

    guidance_distilled = True
    timestep_unit = 1000.0
    t5_length = 512
    max_shift = 1.15
    from_one = True
    guidance_embedding: ClassVar[float] = 3.5
    """What the network is told its guidance is, for every pass: the pipeline's default."""

    @property
    def channels(self) -> int:
        """Channels of one unpacked latent; the network reads 2 x 2 patches."""
        return self.network.config.in_channels // 4

    @property
    def multiple(self) -> int:
        """Pixels that height and width must be multiples of."""
        return self.pipeline.vae_scale_factor * 2

    def _pixels(self) -> tuple[int, int]:
        return (self.pipeline.default_sample_size * self.pipeline.vae_scale_factor,) * 2

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Return embeddings [prompt token width] and pooled [prompt pooled_width]."""
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
        """Return velocity [row *latent]."""
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


FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}
"""By class name, so that diffusers need not be imported; subclasses count."""


def family_of(pipeline: Any) -> type[Family]:
    """Return the family of a pipeline, or raise ValueError naming the ones there are."""
    for base in type(pipeline).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    raise ValueError(
        f"{type(pipeline).__name__} is not supported; expected one of {', '.join(FAMILIES)}. "
        "Load the text-to-image pipeline of this model."
    )
