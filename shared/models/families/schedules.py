"""Noise levels of the diffusers schedulers, in the scale of k-diffusion."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ...score.noise_levels import input_scale, nearest_timestep, sigma_of

ABAR_FLOOR = 2.0**-24
"""Stands for abar = 0 (zero terminal SNR), where sigma would be infinite; diffusers' own value."""


@runtime_checkable
class Schedule(Protocol):
    """The noise levels of a sampling run, and the network's timestep at each."""

    def sigmas(self, steps: int) -> Tensor:
        """Return [steps + 1] noise levels, noisiest first, float32 on the CPU."""

    def timestep(self, sigma: float) -> Tensor:
        """Return the scalar the network reads at `sigma`."""

    def sigma(self, timestep: float) -> float:
        """Return the noise level of a training timestep, between two levels also."""

    def percent(self, timestep: float) -> float:
        """Return the share of the schedule that is behind, 0 at pure noise, 1 at the image."""

    def latent_scale(self, sigma: float) -> float:
        """Return x / latents, where latents are what the pipeline keeps at `sigma`."""


class DiscreteSchedule:
    """DDIM over the betas a model was trained with: sigma = sqrt((1 - abar) / abar).

    Diffusers' DDIM steps to `timestep - train_timesteps // steps`; that is the next timestep for
    "leading" spacing and whenever the division has no remainder. Elsewhere the levels returned
    here belong to the timesteps that the network reads, on which a score depends.
    """

    def __init__(self, config: Mapping[str, Any]):
        from diffusers import DDIMScheduler

        # Latents are not pixels: clipping, on by default where a config does not say, is not meant.
        self.scheduler = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
        abar = self.scheduler.alphas_cumprod.double().clamp(min=ABAR_FLOOR)
        self.table = sigma_of(abar)
        self.final = sigma_of(float(self.scheduler.final_alpha_cumprod))

    def sigmas(self, steps: int) -> Tensor:
        most = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= most:
            raise ValueError(f"`steps` must be between 1 and {most}, got {steps}.")
        self.scheduler.set_timesteps(steps)
        levels = self.table[self.scheduler.timesteps.cpu().long()].tolist()
        return torch.tensor([*levels, self.final], dtype=torch.float32)

    def timestep(self, sigma: float) -> Tensor:
        """Return the training timestep whose level is nearest in the logarithm."""
        return torch.tensor(nearest_timestep(self.table, sigma))

    def sigma(self, timestep: float) -> float:
        """Return the noise level of a training timestep, as k-diffusion interpolates it."""
        return float(np.exp(np.interp(timestep, range(len(self.table)), self.table.log().numpy())))

    def percent(self, timestep: float) -> float:
        return 1 - timestep / (len(self.table) - 1)

    def signal(self) -> Tensor:
        """Return sqrt(abar) of every training timestep, [timestep] float64: what an image keeps."""
        return (1 + self.table**2).rsqrt()

    def latent_scale(self, sigma: float) -> float:
        """Return sqrt(1 + sigma^2): the pipeline keeps latents at unit variance."""
        return input_scale(sigma)


class FlowSchedule:
    """Euler over rectified-flow levels, shifted as the model's configuration says."""

    def __init__(
        self, config: Mapping[str, Any], *, image_tokens: int, max_shift: float, from_one: bool
    ):
        """Prepare a schedule.

        Args:
            config: Of the pipeline's scheduler.
            image_tokens: Patches of one latent; larger images are shifted more.
            max_shift: The pipeline's default for configurations that do not say.
            from_one: Start from evenly spaced levels 1 .. 1/steps (Flux), not from the
                scheduler's own (SD3).
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        get = self.scheduler.config.get
        low, high = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
        base = get("base_shift", 0.5)
        slope = (get("max_shift", max_shift) - base) / (high - low)
        self.mu = base + slope * (image_tokens - low) if get("use_dynamic_shifting") else None
        self.from_one = from_one and not get("use_flow_sigmas", False)

    def sigmas(self, steps: int) -> Tensor:
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {steps}.")
        levels = np.linspace(1.0, 1 / steps, steps) if self.from_one else None
        self.scheduler.set_timesteps(steps, sigmas=levels, mu=self.mu)
        return self.scheduler.sigmas.cpu().float().clone()

    def timestep(self, sigma: float) -> Tensor:
        """Return sigma in units of training timesteps."""
        return torch.tensor(sigma * self.scheduler.config.num_train_timesteps, dtype=torch.float32)

    def sigma(self, timestep: float) -> float:
        return timestep / self.scheduler.config.num_train_timesteps

    def percent(self, timestep: float) -> float:
        return 1 - self.sigma(timestep)

    def latent_scale(self, sigma: float) -> float:
        return 1.0
