"""Noise levels in the scale of `Denoiser`, and what a network's output means at one of them."""

import math
from typing import TypeVar

from torch import Tensor

from .denoiser import Parametrization

Level = TypeVar("Level", float, Tensor)


def sigma_of(abar: Level) -> Level:
    """Return sigma = sqrt((1 - abar) / abar); abar is the product of all 1 - beta so far."""
    return ((1 - abar) / abar) ** 0.5


def input_scale(sigma: Level) -> Level:
    """Return sqrt(1 + sigma^2), the standard deviation of x = x0 + sigma * noise.

    Networks of epsilon and v-prediction read x divided by it (k-diffusion's 1 / c_in); latents x0
    count as having unit variance.
    """
    return (1 + sigma**2) ** 0.5


def noise_scale(parametrization: Parametrization, sigma: float) -> float:
    """Return the standard deviation of x where sampling begins with pure noise at `sigma`."""
    return 1.0 if parametrization == "flow" else input_scale(sigma)


def noised(parametrization: Parametrization, x0: Tensor, noise: Tensor, sigma: Level) -> Tensor:
    """Return x at `sigma`: clean latents plus noise, or their mixture for flows."""
    kept = 1 - sigma if parametrization == "flow" else 1.0
    return kept * x0 + sigma * noise


def noise_per_velocity(sigma: float) -> float:
    """Return 1 / sqrt(1 + sigma^2) = sqrt(abar): how far the noise moves with the velocity.

    At one x, eps = sqrt(abar) v + sqrt(1 - abar) x.
    """
    return (1 + sigma**2) ** -0.5


def nearest_timestep(sigmas: Tensor, sigma: float) -> int:
    """Return the index of the level, of [timestep] `sigmas`, nearest to `sigma` in the logarithm.

    That is the training timestep at which a network expects this much noise.
    """
    return int((sigmas.log() - math.log(max(sigma, 1e-12))).abs().argmin())


def x0_from_output(
    parametrization: Parametrization, x: Tensor, sigma: float, output: Tensor
) -> Tensor:
    """Return the x0-prediction.

    Args:
        parametrization: What `output` is.
        x: What the network read, in the scale of `Denoiser`: clean latents plus noise at `sigma`,
            or their mixture for flows.
        sigma: Noise level.
        output: Noise, v or velocity.
    """
    if parametrization == "v_prediction":
        scale = input_scale(sigma)
        return x / scale**2 - sigma / scale * output
    return x - sigma * output  # noise, or velocity of a flow


def output_from_x0(parametrization: Parametrization, x: Tensor, sigma: float, x0: Tensor) -> Tensor:
    """Return the output that means `x0`: the inverse of `x0_from_output`."""
    if parametrization == "v_prediction":
        scale = input_scale(sigma)
        return (x / scale**2 - x0) * (scale / sigma)
    return (x - x0) / sigma
