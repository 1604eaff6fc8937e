"""A step of sd-scripts once more: as it was, or with the network reading other pictures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...shared.models.families.flux import Flux
from ...shared.patching import HookMissing
from ...shared.score.noise_levels import nearest_timestep, sigma_of
from ...shared.training.layers.regions import still_noise
from .training import Training

Given = dict[str, Any]
"""Arguments of the trainer's method that gives a step's prediction and target, by name."""
Run = Callable[[Given], tuple]
"""Calls it."""


def repeat(training: Training, run: Run, given: Given, **changed: Any) -> tuple:
    """Return what a step's method gives once more, without gradient, in the present random state.

    Args:
        training: Of the step.
        run: The trainer's method.
        given: What it was given.
        changed: What it is given instead.
    """
    bare = training.accelerator.unwrap_model(given["unet"])
    if hasattr(bare, "prepare_block_swap_before_forward"):
        bare.prepare_block_swap_before_forward()
    again = given | {"is_train": False} | changed
    # Those would have some samples predicted once more, for a target that is not needed here.
    batch = {key: value for key, value in again["batch"].items() if key != "custom_attributes"}
    return run(again | {"batch": batch})


def check_same(timesteps: Tensor, repeated: Tensor) -> None:
    """Raise HookMissing unless a repetition drew the timesteps of the step."""
    if not torch.equal(timesteps, repeated):
        raise HookMissing("A repeated prediction drew other timesteps than the first.")


@contextmanager
def reading(training: Training, given: Given, latents: Tensor, sigma: float) -> Iterator[None]:
    """Have the network read these latents, with still noise, instead of what the trainer noises.

    Args:
        training: Of SD 1, SD 2, SDXL, SD3 or Flux.
        given: What the step's method gets.
        latents: Clean ones, [picture channel height width].
        sigma: Noise level, as `Denoiser` counts it.
    """
    noisy, timestep = _noised(training, given["noise_scheduler"], latents, sigma)

    def swap(_network: torch.nn.Module, args: tuple, kwargs: Given) -> tuple[tuple, Given]:
        if "img" in kwargs:
            return args, kwargs | _for_flux(noisy, timestep, kwargs)
        inputs, timesteps, *text = args
        return (noisy.to(inputs), torch.full_like(timesteps, timestep), *text), kwargs

    network = training.accelerator.unwrap_model(given["unet"])
    hook = network.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _noised(
    training: Training, scheduler: Any, latents: Tensor, sigma: float
) -> tuple[Tensor, float]:
    """Return noisy latents, and their timestep from 0 to 1000."""
    noise = still_noise(latents)
    if not training.has_unet:
        return (1 - sigma) * latents + sigma * noise, 1000 * sigma
    nearest = nearest_timestep(sigma_of(scheduler.alphas_cumprod), sigma)
    timesteps = torch.full((len(latents),), nearest, device=latents.device)
    return scheduler.add_noise(latents, noise, timesteps), float(nearest)


def _for_flux(noisy: Tensor, timestep: float, kwargs: Given) -> Given:
    """Return what Flux reads: patches, timesteps up to 1, and guidance as it was measured with."""
    from library.flux_utils import pack_latents

    changed = {
        "img": pack_latents(noisy).to(kwargs["img"]),
        "timesteps": torch.full_like(kwargs["timesteps"], timestep / 1000),
    }
    if kwargs.get("guidance") is not None:
        changed["guidance"] = torch.full_like(kwargs["guidance"], Flux.guidance_embedding)
    return changed
