"""Embedding optimisation by residual: until the prompt adds no more than an ordinary one does.

Wen et al. (ICLR 2024, arXiv:2407.21720) lower |D|, all that a prompt adds to the prediction, and
with it what the prompt asks for. Modified: lowered is the residual alone, what lies outside of what
control prompts add, at the noises and levels that prompts are scored at; what lies inside is held.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import torch

from ..arrays import Tensor
from ..score.denoiser import Conditioning, concatenate
from ..score.metrics import text_noise
from ..score.trajectory import gradient_rows, loss_scale, not_finite
from ..wording import counted
from .constants import Constants
from .gate import ScoredNoises, content_of
from .method import Method, Mitigation, Start
from .optimisation import check_descent, gradients

UNMOVED = "nothing: no change was found that lowers the residual"


@dataclass(frozen=True, kw_only=True)
class OrdinaryEmbedding(Method):
    """Minimise the residual of the prompt's embedding, and change what ordinary words add little.

    All images of a prompt get one embedding: what is minimised is the prompt's own score, at the
    calibration's noises and size, whatever those of the run. Pooled text is moved along where the
    host hands it out: networks of Stable Diffusion 3's class read much of a prompt from it.
    """

    name: ClassVar[str] = "ordinary"

    learning_rate: float = 0.1
    """Of AdamW, above 0."""
    iterations: int = 20
    """Optimizer steps at most, at least 0; 0 changes nothing."""
    hold: float = 0.3
    """Weight of the change inside the controls' subspace, at least 0."""
    batch_size: int | None = None
    """Rows of one pass with gradient, at least 1; None chooses by device and latent size."""
    checkpointing: bool = False
    """Recompute activations instead of keeping them: less memory, a third more time."""

    def __post_init__(self) -> None:
        check_descent(self.learning_rate, None, 0.0, self.batch_size)
        if self.iterations < 0:
            raise ValueError(f"`iterations` must be at least 0, got {self.iterations}.")
        if not (self.hold >= 0 and math.isfinite(self.hold)):
            raise ValueError(f"`hold` must be at least 0, got {self.hold}.")

    def start(self, start: Start) -> Mitigation:
        """Return the conditioning with each prompt's embedding; the first token stays.

        A prompt costs a conditional pass there and back per iteration and starting noise, without
        the parts of the network that come before the text.

        Raises:
            ValueError: The calibration has no residual, or there is no way to recompute.
            PredictionError: A prediction or gradient is not finite.
        """
        if start.noises is None:
            raise ValueError(
                f"The method {self.name!r} lowers the residual, and no calibration judges by it: "
                "make one with `unmemorize calibrate`, or take the method 'embedding'."
            )
        found: dict[bytes, tuple[Conditioning, int]] = {}
        with gradients(start.network, checkpointing=self.checkpointing):
            cond, rows, steps = start.cond.detached(), [], []
            for row in range(len(cond)):
                key = content_of(cond, row)
                if key not in found:
                    found[key] = _Search(self, start, start.noises, cond[[row]]).run()
                rows.append(found[key][0])
                steps.append(found[key][1])
        moved = concatenate(rows)
        return Mitigation(
            cond=replace(cond, embeddings=moved.embeddings, pooled=moved.pooled),
            changes=tuple(
                f"the embedding in {counted(n, 'step', 'steps')}" if n else UNMOVED for n in steps
            ),
        )


class _Search:
    """The search for one prompt's embedding."""

    def __init__(
        self, settings: OrdinaryEmbedding, start: Start, noises: ScoredNoises, cond: Conditioning
    ):
        self.settings, self.noises, self.cond = settings, noises, cond
        # The leaves are wide, so that their gradients are; the network gets its own dtype.
        moved = [cond.embeddings[:, 1:], *([] if cond.pooled is None else [cond.pooled])]
        self.leaves = [
            each.to(torch.promote_types(each.dtype, torch.float32)).clone().requires_grad_()
            for each in moved
        ]
        size = settings.batch_size or gradient_rows(noises.denoiser)
        self.batches = list(_batches(noises.told, size))
        network = None if settings.checkpointing else start.network
        self.constants = [Constants(network) for _ in self.batches]
        self.held: dict[int, Tensor] = {}
        """By batch, what the prompt adds inside the controls' subspace before anything changes."""

    def run(self) -> tuple[Conditioning, int]:
        """Return the prompt, one row, with the least excess, and the steps it took."""
        optimizer = torch.optim.AdamW(self.leaves, lr=self.settings.learning_rate)
        least, best, steps = math.inf, self._moved(), 0
        for iteration in range(self.settings.iterations + 1):
            moving = iteration < self.settings.iterations
            excess, gradients = self._measure(moving)
            if not (math.isfinite(excess) and all(each.isfinite().all() for each in gradients)):
                steps_done = counted(iteration, "optimizer step", "optimizer steps")
                raise not_finite(f"The residual after {steps_done}", self.noises.denoiser)
            if excess < least:
                least, best, steps = excess, self._moved().detached(), iteration
            if not moving or excess == 0:
                break
            for leaf, gradient in zip(self.leaves, gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
        return best, steps

    def _moved(self) -> Conditioning:
        """Return the prompt as the leaves have it; the first token stays."""
        rest, *pooled = self.leaves
        given = self.cond.embeddings
        return replace(
            self.cond,
            embeddings=torch.cat([given[:, :1], rest.to(given.dtype)], dim=1),
            pooled=pooled[0].to(self.cond.pooled) if pooled else None,
        )

    def _measure(self, moving: bool) -> tuple[float, list[Tensor]]:
        """Return the mean excess over all noises, and the gradients of the loss."""
        total, gradients = 0.0, [torch.zeros_like(leaf) for leaf in self.leaves]
        scale = loss_scale(self.noises.denoiser)
        for batch in range(len(self.batches)):
            with torch.set_grad_enabled(moving):
                excess, change = self._of_batch(batch)
            total += float(excess.detach().sum()) / len(self.noises.told)
            if moving:
                loss = scale * (excess + self.settings.hold * change).sum()
                parts = torch.autograd.grad(loss / len(self.noises.told), self.leaves)
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient += part / scale
        return total, gradients

    def _of_batch(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return [seed] how far residuals exceed the controls' median, and the change inside.

        Both in units of that median.
        """
        noises, seeds = self.noises, self.batches[batch]
        sigma, cond = noises.sigmas[seeds[0]], self._moved()[[0] * len(seeds)]
        with self.constants[batch].of(batch):
            x0 = noises.denoiser.denoise(noises.x[seeds], sigma, cond)
        added = text_noise(noises.x0_uncond[seeds], x0, sigma).flatten(1)
        outside = noises.basis.outside(added, seeds)
        inside = added - outside
        held = self.held.setdefault(batch, inside.detach())
        median = noises.basis.median[seeds].exp().to(added)
        residual = torch.linalg.vector_norm(outside, dim=1)
        change = torch.linalg.vector_norm(inside - held, dim=1)
        return (residual / median - 1).clamp(min=0), change / median


def _batches(told: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield the seeds of one pass each: of one level, at most `size`."""
    for _, group in groupby(sorted(range(len(told)), key=told.__getitem__), key=told.__getitem__):
        seeds = list(group)
        for first in range(0, len(seeds), size):
            yield seeds[first : first + size]
