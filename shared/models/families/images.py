"""Text-to-image families whose pipelines say nearly everything themselves, most used first."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from .family import Family, Guidance
from .flux import Flux

TRUE_GUIDANCE = Guidance(calls=2, scale="true_cfg_scale", negative=True)
TWO_CALLS = Guidance(calls=2)


class QwenImage(Family):
    """Packed latents; a chat model reads the prompt inside of a template."""

    pipelines = ("QwenImagePipeline",)
    guidance = TRUE_GUIDANCE
    packed = True
    patch = 2
    one_frame = True


class ZImage(Family):
    """Lists of latents and of embeddings, one entry an image; time counts up."""

    pipelines = ("ZImagePipeline",)
    guidance = Guidance(prompt_first=True, off=0.0, offset=1.0)
    one_by_one = False  # each entry keeps its own length
    negated = True
    backwards = True
    patch = 2

    def pack(self, latents: Tensor) -> Tensor:
        """Return latents [row channel 1 height width]: one frame."""
        return latents.unsqueeze(2)

    def unpack(self, packed: Tensor) -> Tensor:
        return packed.squeeze(2)


class Squares(Family):
    """2 x 2 latents of the autoencoder stand in one position, brought to one mean and variance."""

    stack = 2
    epsilon: ClassVar[float] = 1e-4
    """Added to the variance."""

    def to_autoencoder(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return self.pipeline._unpatchify_latents(latents * std + mean)

    def from_autoencoder(self, latents: Tensor) -> Tensor:
        squares = pixel_unshuffle(latents, 2)  # channel by channel, rows before columns
        mean, std = self._statistics(squares)
        return (squares - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.pipeline.vae.bn
        mean, variance = (each.view(1, -1, 1, 1).to(like) for each in
                          (norm.running_mean, norm.running_var))  # fmt: skip
        return mean, torch.sqrt(variance + self.epsilon)


class Flux2(Squares):
    """Squares of 2 x 2 latents in one position; guidance distilled into the network."""

    pipelines: ClassVar[tuple[str, ...]] = ("Flux2Pipeline",)
    guidance = Guidance(scale="")
    guidance_distilled = True
    guidance_embedding: float | None = 4.0  # the pipeline's default
    one_by_one = False
    packed = True

    def pack(self, latents: Tensor) -> Tensor:
        """Return the positions [row position channel] of latents."""
        return latents.flatten(2).transpose(1, 2)

    def unpack(self, packed: Tensor) -> Tensor:
        scale = self.pixels(self.pipeline)
        return packed.transpose(1, 2).unflatten(2, (self.height // scale, self.width // scale))


class Flux2Klein(Flux2):
    """The smaller one, guided by the empty prompt unless that was distilled into it."""

    pipelines = ("Flux2KleinPipeline",)
    guidance = TWO_CALLS
    guidance_distilled = False
    guidance_embedding = None


class Chroma(Flux):
    """Flux without CLIP and without guidance of its own."""

    pipelines = ("ChromaPipeline",)
    checkpoints = ()
    guidance = TWO_CALLS
    guidance_distilled = False
    guidance_embedding = None  # type: ignore[assignment]

    def readers(self) -> list[tuple[Any, int]]:
        return [(self.pipeline.tokenizer, 512)]


class FluxKontext(Flux):
    """The editing model of Flux.1, asked without an image to edit."""

    pipelines = ("FluxKontextPipeline",)

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "max_area": self.height * self.width}


class Lumina2(Family):
    """Two calls a step; time counts up."""

    pipelines = ("Lumina2Pipeline",)
    guidance = TWO_CALLS
    negated = True
    backwards = True
    one_by_one = False
    patch = 2


class Sana(Family):
    """A linear transformer on 32 times smaller images."""

    pipelines = ("SanaPipeline",)
    one_by_one = False


class PixArtSigma(Family):
    """Noise prediction with learnt variances; T5 alone."""

    pipelines = ("PixArtSigmaPipeline",)
    one_by_one = False
    t5_length = 300
    patch = 2
    half_precision = torch.float16

    def readers(self) -> list[tuple[Any, int]]:
        return [(self.pipeline.tokenizer, self.t5_length)]


class AuraFlow(Family):
    """T5 alone, zeros in place of padding."""

    pipelines = ("AuraFlowPipeline",)
    one_by_one = False
    t5_length = 256
    patch = 2

    def readers(self) -> list[tuple[Any, int]]:
        return [(self.pipeline.tokenizer, self.t5_length)]


class HiDreamImage(Family):
    """T5, the layers of a chat model, and the pooled text of two CLIP encoders."""

    pipelines = ("HiDreamImagePipeline",)
    negated = True
    one_by_one = False
    patch = 2


class HunyuanImage(Family):
    """A chat model and, for quoted words, ByT5; guided by a guider of the pipeline."""

    pipelines = ("HunyuanImagePipeline",)
    guidance = Guidance(calls=2, scale="distilled_guidance_scale", negative=True)
    one_by_one = False


class CogView4(Family):
    """Prompts are padded to a multiple of 16 tokens, without a mask."""

    pipelines = ("CogView4Pipeline",)
    guidance = TWO_CALLS
    patch = 2


class HunyuanDiT(Family):
    """CLIP's and T5's tokens, sizes and a style; learnt variances."""

    pipelines = ("HunyuanDiTPipeline",)
    one_by_one = False
    patch = 2
    half_precision = torch.float16


class ErnieImage(Squares):
    """Flux.2's autoencoder; the prompt as it is, not rewritten by the pipeline's language model."""

    pipelines = ("ErnieImagePipeline",)
    arguments: ClassVar[Mapping[str, Any]] = {"use_pe": False}
    epsilon = 1e-5

    @classmethod
    def pixels(cls, pipeline: Any) -> int:
        return pipeline.vae_scale_factor  # of the squares already


IMAGES = (
    QwenImage, ZImage, Flux2, Flux2Klein, Chroma, FluxKontext, Lumina2, Sana, PixArtSigma, AuraFlow,
    HiDreamImage, HunyuanImage, CogView4, HunyuanDiT, ErnieImage,
)  # fmt: skip
