"""Magnitudes of the text-conditional prediction: numbers with units and no opinion.

All of them work on D = (x0_uncond - x0_cond) / sigma, which is the difference of the noise
predictions of epsilon and v-prediction networks and of the velocities of flow networks.
"""

import math
from collections.abc import Sequence

import torch

from ..arrays import Float, Tensor, widened


def text_noise(
    x0_uncond: Float[Tensor, " row *latent"],
    x0_cond: Float[Tensor, " row *latent"],
    sigma: Float[Tensor, ""] | float,
) -> Float[Tensor, " row *latent"]:
    """Return D, what the text adds to the network's prediction (units of the noise, std 1).

    Half precision is widened first: the two predictions agree in most of their digits.

    Args:
        x0_uncond: Clean latents predicted from the empty prompt.
        x0_cond: Clean latents predicted from the prompt.
        sigma: Noise level of both, above 0, in the units of `Denoiser`.
    """
    return (widened(x0_uncond) - widened(x0_cond)) / sigma


def text_noise_norm(
    cond: Float[Tensor, " row *latent"], uncond: Float[Tensor, " row *latent"]
) -> Float[Tensor, " row"]:
    """Return the L2 norm of what the text adds, per row (latent units, >= 0).

    Wen et al., ICLR 2024, arXiv:2407.21720, Eq. 2. Of noise predictions or velocities it is |D|; of
    x0-predictions it is sigma * |D|. Grows with latent size: compare like with like.
    """
    difference = (widened(cond) - widened(uncond)).flatten(1)
    norm = torch.linalg.vector_norm
    # A float32 sum of 16,384 squares is wrong in the fifth digit.
    if difference.device.type != "mps":
        return norm(difference, dim=1, dtype=torch.float64).to(difference.dtype)
    # Apple's GPUs have nothing wider: sums of sums have as few terms as can be.
    few = math.isqrt(max(1, difference.shape[1] - 1)) + 1
    padded = torch.nn.functional.pad(difference, (0, few * few - difference.shape[1]))
    return norm(norm(padded.unflatten(1, (few, few)), dim=2), dim=1)


def per_element(norm: Tensor, latent_shape: Sequence[int]) -> Tensor:
    """Return an L2 norm as a root mean square (>= 0), which does not grow with resolution.

    Args:
        norm: Any shape, L2 over one latent.
        latent_shape: Shape of that latent, without the batch.
    """
    return norm / math.sqrt(math.prod(latent_shape))


def difference_map(
    text_noise: Float[Tensor, " row channel *place"],
) -> Float[Tensor, " row *place"]:
    """Return where in the latent the text acts, log(1 + sum over channels of D squared), >= 0.

    The score-difference map of memorization masks: large where the prompt dictates the pixels.
    """
    return text_noise.square().sum(dim=1).log1p()
