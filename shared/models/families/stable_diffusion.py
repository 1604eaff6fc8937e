"""How pipelines of Stable Diffusion 1, 2 and XL read prompts and call their network."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...score.denoiser import Conditioning, Parametrization
from ..schedules import DiscreteSchedule, Schedule


class Family:
    """What differs between Stable Diffusion 1/2, XL, 3 and Flux.

    A member holds no weights of its own: it asks the pipeline's own methods for everything that
    they compute, so that scores belong to the images this pipeline makes.
    """

    network_name: ClassVar[str] = "unet"
    guidance_distilled: ClassVar[bool] = False
    timestep_unit: ClassVar[float] = 1.0
    """Training timesteps in one unit of what the network is told."""

    def __init__(self, pipeline: Any, resolution: int | tuple[int, int] | None):
        self.pipeline = pipeline
        size = (resolution, resolution) if isinstance(resolution, int) else resolution
        self.height, self.width = self._check(self._pixels() if size is None else size)

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
                f"The scheduler says prediction_type={kind!r}; expected 'epsilon' or "
                "'v_prediction'."
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

    def pack(self, latents: Tensor) -> Tensor:
        """Return latents [row *latent] in the shape the network reads and answers in."""
        return latents

    def unpack(self, packed: Tensor) -> Tensor:
        """Return latents [row *latent] from the network's shape."""
        return packed

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
