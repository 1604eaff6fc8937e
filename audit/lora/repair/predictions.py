"""What a network predicts for prompts at noise levels: with the LoRA, without it, and repaired."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....shared.score.denoiser import Conditioning
from ....shared.score.noise_levels import noised

if TYPE_CHECKING:
    from ....shared.models.adapter import PipelineDenoiser

ROWS = 4
"""Of a batch."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt with an image [*latent] to which noise is added."""

    prompt: str
    latents: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows at one noise level, and what is predicted there before a repair."""

    prompts: tuple[str, ...]
    sigma: Tensor
    """Scalar."""
    x: Tensor
    """[row *latent]."""
    cond: Conditioning
    """Of the prompts with the LoRA."""
    with_lora: Tensor
    """Predictions [row *latent], see `steering`."""
    without: Tensor
    """Those of the base model."""


def make_batches(
    denoiser: "PipelineDenoiser",
    samples: Sequence[Sample],
    count: int,
    *,
    levels: int,
    seed: int,
    progress: Callable[[int], object] = int,
) -> tuple[Batch, ...]:
    """Return batches whose noise levels and samples take turns.

    Args:
        denoiser: With the LoRA as it is in its file.
        samples: At least one.
        count: Of batches.
        levels: Steps of the schedule from which noise levels are taken.
        seed: Of samples' order and of their noise.
        progress: Called with the number of batches that were just made.
    """
    generator = torch.Generator().manual_seed(seed)
    sigmas = denoiser.sigmas(levels)[:-1]
    order = torch.cat([torch.randperm(len(samples), generator=generator)
                       for _ in range(-(-count * ROWS // len(samples)))]).tolist()  # fmt: skip
    made = []
    for number in range(count):
        rows = [samples[i] for i in order[number * ROWS : (number + 1) * ROWS]]
        # Steps by the golden section: any number of batches covers the levels evenly.
        sigma = sigmas[int((number * 0.618034 + 0.01) % 1 * len(sigmas))]
        latents = torch.stack([row.latents for row in rows])
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        x = noised(denoiser.parametrization, latents, noise, float(sigma))
        prompts = tuple(row.prompt for row in rows)
        predicted = []
        for lora in (True, False):
            with torch.no_grad(), nullcontext() if lora else denoiser.lora_disabled():
                cond = denoiser.encode(prompts)
                predicted.append((cond, (x - denoiser.denoise(x, sigma, cond)) / sigma))
        (cond, with_lora), (_, without) = predicted
        made.append(Batch(prompts=prompts, sigma=sigma, x=x, cond=cond, with_lora=with_lora,
                          without=without))  # fmt: skip
        progress(1)
    return tuple(made)


def steering(denoiser: "PipelineDenoiser", batch: Batch, *, graph: bool = False) -> Tensor:
    """Return (x - x0) / sigma of a batch [row *latent]: noise, or velocity of a flow.

    Args:
        denoiser: Carries the factors to be measured.
        batch: Rows at one level.
        graph: Keep the graph, for which text encoders are taken as they were.
    """
    with nullcontext() if graph else torch.no_grad():
        cond = batch.cond if graph else denoiser.encode(batch.prompts)
        return (batch.x - denoiser.denoise(batch.x, batch.sigma, cond)) / batch.sigma


def kept(denoiser: "PipelineDenoiser", batches: Sequence[Batch]) -> float:
    """Return the share of what the LoRA changes in predictions that is still changed, 0 to 1.

    1 - |repaired - LoRA| / |base - LoRA|, norms over all batches: 1 for the LoRA itself, 0 for
    the base model, and about m for the LoRA at strength m.
    """
    moved = whole = 0.0
    for batch in batches:
        moved += float((steering(denoiser, batch) - batch.with_lora).square().sum())
        whole += float((batch.without - batch.with_lora).square().sum())
    return max(0.0, 1 - (moved / whole) ** 0.5) if whole else 1.0
