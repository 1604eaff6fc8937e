"""Filters asked with little to say: samples by number, one timestep."""

import math
import threading
from collections.abc import Callable

import torch
from unmemorize.shared.training.filter.filter import Gather, MemorizationFilter
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.filter.thresholds import AbsoluteThreshold

NEVER = AbsoluteThreshold(math.inf)


def samples_of(count: int) -> list[Sample]:
    return [Sample(file=f"{i}.png", caption=f"caption {i}") for i in range(count)]


def in_processes(count: int, process: Callable[[int, Gather], None]) -> None:
    """Run `process(rank, gather)` in threads that exchange tensors as processes do."""
    barrier, shelf = threading.Barrier(count), [None] * count

    def run(rank: int) -> None:
        def gather(own: torch.Tensor) -> torch.Tensor:
            shelf[rank] = own
            barrier.wait()
            everyone = torch.cat(shelf)
            barrier.wait()
            return everyone

        process(rank, gather)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def weigh(made: MemorizationFilter, cond, uncond, timesteps=None, **settings) -> torch.Tensor:
    timesteps = torch.full((len(cond),), 500) if timesteps is None else timesteps
    return made.weigh(cond, uncond, timesteps=timesteps, samples=samples_of(len(cond)), **settings)
