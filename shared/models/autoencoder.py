"""Images to latents and back through a diffusers autoencoder, in the scale the network reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..arrays import Float, Tensor


@torch.no_grad()
def decode(vae: Any, latents: Float[Tensor, "row channel *place"], device: torch.device) -> Tensor:
    """Return images [row 3 *place] in 0..1 of clean latents; of video, places with frames.

    Args:
        vae: Of a pipeline.
        latents: In the scale that the network reads.
        device: Where the pipeline computes; weights that are put away rest elsewhere.
    """
    with _safe_dtype(vae):
        factor, shift = _scale(vae, latents.ndim, device)
        images = vae.decode(latents.to(device, vae.dtype) / factor + shift, return_dict=False)
    return (images[0].float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode(vae: Any, images: Float[Tensor, "row 3 *place"], device: torch.device) -> Tensor:
    """Return the most likely clean latents [row channel *place] of images in 0..1.

    See `decode` for the arguments.
    """
    with _safe_dtype(vae):
        factor, shift = _scale(vae, images.ndim, device)
        found = vae.encode(images.to(device, vae.dtype) * 2 - 1, return_dict=False)[0]
        # A variational autoencoder gives a distribution, `AutoencoderTiny` the latents themselves.
        latents = found if isinstance(found, torch.Tensor) else found.mode()
        return (latents - shift).float() * factor


def _scale(vae: Any, dimensions: int, device: torch.device) -> tuple[Any, Any]:
    """Return factor and shift, by which (x - shift) * factor is what the network reads.

    Numbers for most; some keep a mean and a deviation per channel, [1 channel 1 1].
    """
    config, factor = vae.config, vae.config.get("scaling_factor") or 1.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return factor, config.get("shift_factor") or 0.0
    shape = (1, -1, *[1] * (dimensions - 2))
    like = {"dtype": vae.dtype, "device": device}
    mean, std = (torch.tensor(values, **like).view(shape) for values in (mean, std))
    return factor / std, mean


@contextmanager
def _safe_dtype(vae: Any) -> Iterator[None]:
    """Run an autoencoder that overflows in fp16 (SDXL's) in float32."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and vae.config.get("force_upcast", False)
    try:
        if upcast:
            vae.to(torch.float32)
        yield
    finally:
        if upcast:
            vae.to(dtype)
