"""Text-to-video families: latents have frames, [row channel frame height width]."""

from typing import Any

from torch import Tensor

from ..calls.network_call import NetworkCall
from .family import Family, Guidance


class Wan(Family):
    """Two calls a step; 2.2 has one network for the noisy half of the levels, one for the other."""

    pipelines = ("WanPipeline",)
    video = True
    guidance = Guidance(calls=2)
    one_by_one = False
    t5_length = 512
    patch = 2

    def readers(self) -> list[tuple[Any, int]]:
        return [(self.pipeline.tokenizer, self.t5_length)]


class LTX(Family):
    """Packed latents; T5 alone."""

    pipelines = ("LTXPipeline",)
    video = True
    one_by_one = False
    t5_length = 128
    packed = True

    def readers(self) -> list[tuple[Any, int]]:
        return [(self.pipeline.tokenizer, self.t5_length)]

    def pack(self, latents: Tensor) -> Tensor:
        return self.pipeline._pack_latents(latents, *self._patches())

    def unpack(self, packed: Tensor) -> Tensor:
        call, pipeline = self.held().call, self.pipeline
        sides = (call.get((name,)) for name in ("num_frames", "height", "width"))
        return pipeline._unpack_latents(packed, *sides, *self._patches())

    @classmethod
    def by_frame(cls, pipeline: Any, call: NetworkCall, rows: Tensor) -> Tensor | None:
        frames = int(call.get(("num_frames",))) // pipeline.transformer_temporal_patch_size
        return rows.unflatten(1, (frames, -1)).movedim(-1, 1)  # patches stand frame after frame

    def to_autoencoder(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return self.pipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std)

    def from_autoencoder(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = (
            values.to(latents).view(1, -1, 1, 1, 1)
            for values in (vae.latents_mean, vae.latents_std)
        )
        return (latents - mean) * vae.config.scaling_factor / std

    def _patches(self) -> tuple[int, int]:
        pipeline = self.pipeline
        return pipeline.transformer_spatial_patch_size, pipeline.transformer_temporal_patch_size


class HunyuanVideo(Family):
    """A chat model's tokens and CLIP's pooled text; guidance distilled into the network."""

    pipelines = ("HunyuanVideoPipeline",)
    video = True
    guidance = Guidance(calls=2, scale="true_cfg_scale", negative=True)
    guidance_distilled = True
    guidance_embedding = 6.0  # the pipeline's default
    one_by_one = False
    patch = 2


VIDEOS = (Wan, LTX, HunyuanVideo)
