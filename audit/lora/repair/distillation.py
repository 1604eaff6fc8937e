"""A short distillation: memorized captions are led to the base model, all others are held.

The student is the LoRA. For memorized captions, and their other wordings, its target is what the
base model predicts; for captions to be kept, what the LoRA itself predicted. That is the erasure
loss of "Ablating Concepts in Text-to-Image Diffusion Models" (Kumari et al., arXiv:2303.13516,
eq. 4) with the base model in place of an anchor caption, and with captions held as its prior
preservation does. No image is needed besides the training images that come back.
"""

from contextlib import closing

import torch
from torch import Tensor

from .case import Case, Path
from .predictions import Batch, steering
from .weights import Factors

STEPS = 300
RATE = 0.02
"""Largest step of a number, relative to the root mean square of its module's numbers."""
LEAST = 1e-4
"""Root mean square that a module counts with where it has less."""
HOLD = 4.0
"""Weight of the captions to be kept, against that of the memorized ones."""


def distillation(case: Case) -> Path:
    """Return the way back from the distilled factors to those of the LoRA."""
    original, distilled = case.weights.original, distill(case)
    return lambda left: {
        place: torch.lerp(distilled[place], factor, left) for place, factor in original.items()
    }


def distill(case: Case) -> Factors:
    """Return the factors after training; modules on text encoders stay as they were.

    Both losses are relative: 1 for memorized captions at the start, 0 for those to be kept.
    """
    weights = case.weights
    weights.put(weights.original)
    places = [place for place in weights.original if not place[0].startswith("text_encoder")]
    wholes = [_distance(batches) for batches in (case.memorized, case.held)]
    with (
        case.trained(places) as factors,
        closing(case.bars("distillation", STEPS, 0, "step")) as bar,
    ):
        groups = [
            {"params": [factor], "lr": RATE * max(_size(weights.original[place]), LEAST)}
            for place, factor in factors.items()
        ]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        for step in range(STEPS):
            optimizer.zero_grad()
            for batches, whole, weight in zip(
                (case.memorized, case.held), wholes, (1.0, HOLD), strict=True
            ):
                batch = batches[step % len(batches)]
                target = batch.without if batches is case.memorized else batch.with_lora
                missed = (steering(case.denoiser, batch, graph=True) - target).square().mean()
                (weight * missed / whole).backward()
            optimizer.step()
            schedule.step()
            bar.update(1)
        return weights.original | {
            place: factor.detach().float().clone() for place, factor in factors.items()
        }


def _size(factor: Tensor) -> float:
    """Return the root mean square."""
    return float(factor.square().mean().sqrt())


def _distance(batches: tuple[Batch, ...]) -> Tensor:
    """Return the mean square of what the LoRA changes in the predictions."""
    return torch.stack([(b.with_lora - b.without).square().mean() for b in batches]).mean()
