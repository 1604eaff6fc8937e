"""From what a network answers to clean latents and back, for each parametrization."""

from torch import Tensor

from ..score.denoiser import Parametrization


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
        scale = (1 + sigma**2) ** 0.5
        return x / scale**2 - sigma / scale * output
    return x - sigma * output  # noise, or velocity of a flow


def output_from_x0(parametrization: Parametrization, x: Tensor, sigma: float, x0: Tensor) -> Tensor:
    """Return what the network would have to answer for `x0`: the inverse of `x0_from_output`."""
    if parametrization == "v_prediction":
        scale = (1 + sigma**2) ** 0.5
        return (x / scale**2 - x0) * (scale / sigma)
    return (x - x0) / sigma
