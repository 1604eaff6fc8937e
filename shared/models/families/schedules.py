"""Noise levels of the diffusers schedulers, in the scale of k-diffusion."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ...score.noise_levels import input_scale, nearest_timestep, sigma_of

ABAR_FLOOR = 2.0**-24
"""Stands for abar = 0 (zero terminal SNR), where sigma would be infinite; diffusers' own value."""
FINE_STEPS = 50
"""Of the run between whose levels others are placed; detection's own number."""

SAME_LEVEL = 1e-6
"""Distance of flow levels that are one level, at float32."""


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
    """Euler over the levels of a rectified flow that the pipeline itself prepares."""

    def __init__(self, levels: Callable[[int], tuple[Tensor, Tensor]], train_timesteps: int):
        """Prepare a schedule.

        Args:
            levels: Returns the noise levels [steps + 1] and times [steps] of a run of the pipeline.
            train_timesteps: Times of the scheduler at level 1.
        """
        self._levels, self._most = levels, train_timesteps
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def sigmas(self, steps: int) -> Tensor:
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {steps}.")
        return self._run(steps)[0].clone()

    def timestep(self, sigma: float) -> Tensor:
        """Return the scheduler's time at a level, between those of its own run also."""
        sigmas, times = self._table
        for known, own in self._known.values():
            if (gap := (known[:-1] - sigma).abs()).min() < SAME_LEVEL:
                return own[gap.argmin()]
        if not times.is_floating_point():  # UniPC's and DPM-Solver's times are whole, cut off
            return torch.tensor(int(sigma * self._most))
        if self._is_linear:
            return torch.tensor(sigma * self._most, dtype=torch.float32)
        rising = np.interp(sigma, sigmas[:-1].flip(0).numpy(), times.flip(0).numpy())
        return torch.tensor(float(rising), dtype=torch.float32)

    def sigma(self, timestep: float) -> float:
        if self._is_linear:
            return timestep / self._most
        sigmas, times = self._table
        return float(np.interp(timestep, times.flip(0).numpy(), sigmas[:-1].flip(0).numpy()))

    def percent(self, timestep: float) -> float:
        return 1 - self.sigma(timestep)

    def latent_scale(self, sigma: float) -> float:
        return 1.0

    @property
    def _is_linear(self) -> bool:
        """Whether time is the level times a number; CogView4 shifts levels and leaves times."""
        sigmas, times = self._table
        whole = 0.0 if times.is_floating_point() else 1.0
        return bool(
            (sigmas[:-1] * self._most - times).abs().max() <= whole + 1e-3 * self._most / 1e3
        )

    @property
    def _table(self) -> tuple[Tensor, Tensor]:
        return self._run(FINE_STEPS)

    def _run(self, steps: int) -> tuple[Tensor, Tensor]:
        if steps not in self._known:
            sigmas, times = self._levels(steps)
            self._known[steps] = sigmas.cpu().float(), times.cpu()
        return self._known[steps]
