"""What differs between the families of pipelines."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...score.denoiser import Conditioning, Parametrization
from .schedules import DiscreteSchedule, FlowSchedule, Schedule


class Family:
    """How the pipelines of one architecture read prompts and call their network.

    A family computes nothing that the pipeline can compute itself: it calls the pipeline's own
    methods, so that scores belong to the images this pipeline makes.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """Names of diffusers' classes."""
    checkpoints: ClassVar[tuple[str, ...]] = ()
    """How diffusers' names for single-file checkpoints of this family begin."""
    network_name: ClassVar[str] = "unet"
    guidance_distilled: ClassVar[bool] = False
    guidance_embedding: float | None = None
    """Guidance that the network reads as an input in every pass; None for networks without it."""
    half_precision: ClassVar[torch.dtype] = torch.float16
    """What it computes in on a GPU; bfloat16 where activations leave the range of float16."""
    timestep_unit: ClassVar[float] = 1.0
    """Training timesteps in one unit of the network's input."""

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
        predicted = self.pipeline.scheduler.config.get("prediction_type", "epsilon")
        if predicted not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"The scheduler says prediction_type={predicted!r}; expected 'epsilon' or "
                "'v_prediction'."
            )
        return predicted

    @staticmethod
    def lora_options(pipeline: Any) -> dict[str, Any]:
        """Return the arguments that diffusers' converter of LoRA files takes besides the file."""
        return {}

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


class FlowFamily(Family):
    """Transformers trained by flow matching; their levels are shifted by the size of the image."""

    network_name = "transformer"
    half_precision = torch.bfloat16
    max_shift: ClassVar[float]
    """The pipeline's default for configurations that do not say."""
    from_one: ClassVar[bool] = False
    """Sampling starts from evenly spaced levels 1 .. 1/steps, not from the scheduler's own."""
    t5_length: int
    """Tokens of T5: the pipeline's own default for `max_sequence_length`."""

    def parametrization(self) -> Parametrization:
        return "flow"

    def schedule(self) -> Schedule:
        return FlowSchedule(
            self.pipeline.scheduler.config,
            image_tokens=self.height * self.width // self.multiple**2,
            max_shift=self.max_shift,
            from_one=self.from_one,
        )
