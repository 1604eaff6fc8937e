"""Filters asked with little to say: samples by number, one timestep."""

import math

import torch
from unmemorize.shared.training.filter import MemorizationFilter
from unmemorize.shared.training.sample_log import Sample
from unmemorize.shared.training.thresholds import AbsoluteThreshold

NEVER = AbsoluteThreshold(math.inf)


def samples_of(count: int) -> list[Sample]:
    return [Sample(file=f"{i}.png", caption=f"caption {i}") for i in range(count)]


def weigh(made: MemorizationFilter, cond, uncond, timesteps=None, **settings) -> torch.Tensor:
    timesteps = torch.full((len(cond),), 500) if timesteps is None else timesteps
    return made.weigh(cond, uncond, timesteps=timesteps, samples=samples_of(len(cond)), **settings)
