"""How each family of diffusers pipelines reads prompts and calls its network."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .denoiser import Conditioning, Parametrization
from .schedules import DiscreteSchedule, FlowSchedule, Schedule


class Family:
    """What differs between Stable Diffusion 1/2, XL, 3 and Flux.

    A member holds no weights of its own: it asks the pipeline's own methods for everything that
    they compute, so that scores belong to the images this pipeline makes.
    """

    network_name: ClassVar[str] = "unet"
    guidance_distilled: ClassVar[bool] = False

    def __init__(self, pipeline: Any, resolution: int | None):
        self.pipeline = pipeline
        size = self._pixels() if resolution is None else (resolution, resolution)
        self.height, self.width = self._check(size)

    @property
    def network(self) -> torch.nn.Module:
        """The U-Net or transformer."""
        return getattr(self.pipeline, self.network_name)

    @property
    def channels(self) -> int:
        """Channels of one latent."""
        return self.network.config.in_channels

    @property
    def multiple(self) -> int:
        """Pixels that height and width must be multiples of."""
        return self.pipeline.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent."""
        scale = self.pipeline.vae_scale_factor
        return self.channels, self.height // scale, self.width // scale

    @property
    def zero_unconditional(self) -> bool:
        """Whether guidance moves away from zeros instead of the empty prompt."""
        return False

    def parametrization(self) -> Parametrization:
        """Return what the network predicts, as its scheduler says."""
        kind = self.pipeline.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"The scheduler says prediction_type={kind!r}; expected 'epsilon' or 'v_prediction'."
            )
        return kind

    def schedule(self) -> Schedule:
        """Return the noise levels of this model."""
        return DiscreteSchedule(self.pipeline.scheduler.config)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Return embeddings [prompt token width] and pooled [prompt pooled_width] or None."""
        raise NotImplementedError

    def readers(self) -> list[tuple[Any, int]]:
        """Return tokenizer (None: zeros stand there) and positions, in the embeddings' order."""
        return [(self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length)]

    def predict(self, latents: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """Return the network's output [row *latent] for latents in the scheduler's own scale."""
        raise NotImplementedError

    def _pixels(self) -> tuple[int, int]:
        size = self.network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    def _check(self, size: tuple[int, int]) -> tuple[int, int]:
        if any(side < self.multiple or side % self.multiple for side in size):
            raise ValueError(
                f"`resolution` must be a positive multiple of {self.multiple} pixels, "
                f"got {size[0]} x {size[1]}."
            )
        latent = self.pipeline.vae.config.latent_channels
        if self.channels != latent:
            raise ValueError(
                f"The network reads {self.channels} channels, its autoencoder makes {latent}: this "
                "is an inpainting or editing model; give the text-to-image model it was made from."
            )
        return size


class StableDiffusion(Family):
    """SD 1.x and 2.x: one CLIP encoder, last layer, no pooled text."""

    def _check(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.network.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "The network reads a guidance scale (a latent-consistency model): it has no "
                "unconditional branch to compare with. Give the model it was distilled from."
            )
        return super()._check(size)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Return embeddings [prompt token width]."""
        device = self.pipeline._execution_device
        return self.pipeline.encode_prompt(list(prompts), device, 1, False)[0], None

    def predict(self, latents: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """Return noise or velocity [row *latent]."""
        return self.network(
            latents, timestep, encoder_hidden_states=cond.embeddings, return_dict=False
        )[0]


class StableDiffusionXL(StableDiffusion):
    """SDXL: two CLIP encoders side by side, pooled text of the second, sizes as time ids."""

    @property
    def zero_unconditional(self) -> bool:
        """Whether the pipeline replaces an absent negative prompt by zeros."""
        return bool(self.pipeline.config.get("force_zeros_for_empty_prompt", True))

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Return embeddings [prompt token width] and pooled [prompt pooled_width]."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.pipeline._execution_device, do_classifier_free_guidance=False
        )
        return embeddings, pooled

    def readers(self) -> list[tuple[Any, int]]:
        """Return the first tokenizer; the second cuts text in the same way."""
        tokenizer = self.pipeline.tokenizer or self.pipeline.tokenizer_2
        return [(tokenizer, tokenizer.model_max_length)]

    def predict(self, latents: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """Return noise or velocity [row *latent]."""
        size = self.height, self.width
        encoder = self.pipeline.text_encoder_2
        width = encoder.config.projection_dim if encoder is not None else cond.pooled.shape[-1]
        time_ids = self.pipeline._get_add_time_ids(
            size, (0, 0), size, dtype=cond.embeddings.dtype, text_encoder_projection_dim=width
        )
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

    def predict(self, latents: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """Return velocity [row *latent]."""
        rows, channels, height, width = latents.shape
        device, dtype = latents.device, latents.dtype
        pipeline, guided = self.pipeline, self.network.config.guidance_embeds
        guidance = torch.full([rows], self.guidance_embedding, device=device) if guided else None
        output = self.network(
            hidden_states=pipeline._pack_latents(latents, rows, channels, height, width),
            timestep=timestep.expand(rows).to(dtype) / 1000,
            guidance=guidance,
            pooled_projections=cond.pooled,
            encoder_hidden_states=cond.embeddings,
            txt_ids=torch.zeros(cond.embeddings.shape[1], 3, device=device, dtype=dtype),
            img_ids=pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, device, dtype),
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(
            output, self.height, self.width, pipeline.vae_scale_factor
        )


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
