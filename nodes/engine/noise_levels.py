"""What a MODEL of ComfyUI predicts, and the noise levels it is measured at."""

from typing import Any

import comfy.model_sampling
import torch

from ...shared.arrays import Float, Tensor
from ...shared.score.denoiser import Parametrization
from ...shared.score.noise_levels import nearest_timestep


def parametrization_of(sampling: Any) -> Parametrization:
    """Return what the network predicts.

    Args:
        sampling: The model_sampling of a MODEL.

    Raises:
        ValueError: Something whose difference is neither of noise nor of velocities.
    """
    kinds = comfy.model_sampling
    if isinstance(sampling, kinds.CONST):
        return "flow"
    if isinstance(sampling, kinds.V_PREDICTION):
        return "v_prediction"
    if isinstance(sampling, kinds.EPS):
        return "epsilon"
    bases = ", ".join(base.__name__ for base in type(sampling).__mro__[1:3])
    raise ValueError(f"Models that sample by {bases} cannot be measured.")


def noise_levels(sampling: Any, steps: int) -> Float[Tensor, " level"]:
    """Return the levels of DDIM ("leading", offset 1) or Euler for flows, [steps + 1], on the CPU.

    These are the levels diffusers visits on the same model. A shift set by a ModelSampling node is
    followed, so flows may visit others after their first level, which is always 1.

    Args:
        sampling: The model_sampling of a MODEL.
        steps: Of a whole sampling run.
    """
    if isinstance(sampling, comfy.model_sampling.CONST):
        flux = isinstance(sampling, comfy.model_sampling.ModelSamplingFlux)
        last = 1 / steps if flux else float(sampling.sigma_min)
        times = torch.linspace(1, last, steps).tolist()
        levels = [float(sampling.percent_to_sigma(1 - time)) for time in times]
        return torch.tensor([*levels, 0.0])
    table = sampling.sigmas.cpu()
    if not 1 <= steps <= len(table):
        raise ValueError(f"`steps` must be between 1 and {len(table)}, got {steps}.")
    timesteps = torch.arange(steps - 1, -1, -1) * (len(table) // steps) + 1
    return torch.cat([table[timesteps.clamp(max=len(table) - 1)], table[:1]]).float().clone()


def percent_of(sampling: Any, sigma: float) -> float:
    """Return the share of the noise schedule that is behind, 0 at pure noise, 1 at the image.

    Args:
        sampling: The model_sampling of a MODEL.
        sigma: Noise level, above 0.
    """
    if isinstance(sampling, comfy.model_sampling.CONST):
        return 1 - sigma
    levels = sampling.sigmas
    return 1 - nearest_timestep(levels, sigma) / (len(levels) - 1)
