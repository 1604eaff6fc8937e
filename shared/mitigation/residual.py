"""Residual probe: does the training image still come out when its prompt no longer calls it?

A mitigated prompt is not a forgotten image: adversarial embeddings brought pruned models back from
a memorization rate of .20 to .99 (Finding DoRI, ICML 2026). The residual probe optimises such an
embedding and measures how well the network then knows the image; the caller samples with the
embedding and compares the images.

An embedding has many numbers, and with enough of them a network draws images that it never saw. So
a residual probe means something only beside the same probe of images that were not trained on.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..arrays import Float, Tensor
from ..score.denoiser import Conditioning, Denoiser
from ..score.noise_levels import noised
from ..score.trajectory import gradient_rows, not_finite

CHECKS = 16
"""Noise levels, spread over the schedule, at which the loss is measured before and after."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Residual:
    """Result of optimising an embedding towards one image."""

    cond: Conditioning
    """The optimised embedding, one row, to sample with."""
    loss_before: float
    """Mean squared error of the predicted noise (velocity for flows) per element, in units of its
    variance, >= 0, with the embedding at the start; over noises that were not optimised on."""
    loss_after: float
    """The same over the same noises with the optimised embedding; near 0 when the network answers
    any noise with this image."""
    losses: tuple[float, ...]
    """Per iteration, over noises of its own and before its step: noisy, and not comparable."""


def residual_probe(
    denoiser: Denoiser,
    target: Float[Tensor, " *latent"],
    *,
    start: Conditioning,
    generator: torch.Generator,
    iterations: int = 50,
    lr: float = 0.1,
    draws: int = 4,
    schedule_steps: int = 50,
    batch_size: int | None = None,
) -> Residual:
    """Optimise a text embedding so that the network denoises towards one image.

    Adam on all positions of the embedding, after Finding DoRI, ICML 2026, which uses 50 iterations
    at .1; the loss is that of training, |x0_pred - x0|^2 / sigma^2 at random levels of the sampling
    schedule. A pooled text vector stays as it is. The result does not depend on torch's global
    random numbers, and not on `batch_size` beyond float tolerance.

    Args:
        denoiser: The network, with whatever mitigation is built into it.
        target: [*latent] clean latents of the training image, in the network's scale.
        start: One row to start from: the mitigated prompt, another one, or noise.
        generator: Draws noise levels and noises, so that it can be repeated.
        iterations: Steps of Adam, at least 1.
        lr: Learning rate, in units of the embedding, above 0.
        draws: Noises per iteration, all of one level, at least 1.
        schedule_steps: Length of the sampling run the levels are taken from.
        batch_size: Rows of one pass with its gradient; None chooses by device and latent size.

    Raises:
        ValueError: An argument is out of range, `start` has not one row, or `target` another shape
            than the network's latents.
        PredictionError: A prediction or gradient is NaN or infinite.
    """
    _check(denoiser, target, start, iterations, lr, draws, batch_size)
    rows = batch_size or gradient_rows(denoiser)
    task = _Task(denoiser, target, start, generator, draws, schedule_steps, rows)
    last = len(task.sigmas) - 1
    levels = sorted({round(last * i / max(1, CHECKS - 1)) for i in range(CHECKS)})
    checks = [task.draw(level) for level in levels]
    before = task.leaf.detach().clone()
    optimizer, losses = torch.optim.Adam([task.leaf], lr=lr), []
    for _ in range(iterations):
        loss, task.leaf.grad = task.gradient(*task.draw())
        losses.append(loss)
        optimizer.step()
    return Residual(
        cond=task.conditioning(task.leaf.detach().clone()),
        loss_before=task.mean_loss(checks, before),
        loss_after=task.mean_loss(checks, task.leaf),
        losses=tuple(losses),
    )


class _Task:
    """One image, one network, and the embedding that is optimised."""

    def __init__(
        self,
        denoiser: Denoiser,
        target: Tensor,
        start: Conditioning,
        generator: torch.Generator,
        draws: int,
        schedule_steps: int,
        rows: int,
    ):
        self.denoiser, self.generator, self.draws, self.rows = denoiser, generator, draws, rows
        self.sigmas = denoiser.sigmas(schedule_steps)[:-1]
        wide = torch.promote_types(denoiser.dtype, torch.float32)
        self.target = target.detach().to(denoiser.device, wide)
        self.start, self.dtype = start, start.embeddings.dtype
        leaf = start.embeddings.detach().to(torch.promote_types(self.dtype, torch.float32))
        self.leaf = leaf.clone().requires_grad_()

    def draw(self, level: int | None = None) -> tuple[Tensor, Tensor]:
        """Return a noise level, a random one when `level` is None, and noises [draw *latent]."""
        on = {"generator": self.generator, "device": self.generator.device}
        if level is None:
            level = int(torch.randint(len(self.sigmas), (), **on))
        noise = torch.randn((self.draws, *self.target.shape), **on)
        return self.sigmas[level], noise.to(self.target)

    def conditioning(self, embeddings: Tensor) -> Conditioning:
        """Return embeddings as the network reads them."""
        return replace(self.start, embeddings=embeddings.to(self.dtype))

    def gradient(self, sigma: Tensor, noise: Tensor) -> tuple[float, Tensor]:
        """Return the loss per element and its gradient, summed over elements.

        Adam does not see the scale of a loss; half precision does, and would lose the mean's.
        """
        total, loss = torch.zeros_like(self.leaf), 0.0
        with torch.enable_grad():
            for part in self._errors(sigma, noise, self.leaf):
                (gradient,) = torch.autograd.grad(part, self.leaf)
                total += gradient
                loss += part.item()
        if not (total.isfinite().all() and math.isfinite(loss)):
            raise not_finite("The loss of the residual probe or its gradient", self.denoiser)
        return loss / noise.numel(), total

    @torch.no_grad()
    def mean_loss(self, checks: list[tuple[Tensor, Tensor]], embeddings: Tensor) -> float:
        """Return the loss per element, mean over all levels and noises of `checks`."""
        sums = [sum(part.item() for part in self._errors(*c, embeddings)) for c in checks]
        return sum(sums) / sum(noise.numel() for _, noise in checks)

    def _errors(self, sigma: Tensor, noise: Tensor, embeddings: Tensor) -> Iterator[Tensor]:
        """Yield the squared error, summed over elements, of some rows at a time."""
        for part in noise.split(self.rows):
            cond = self.conditioning(embeddings)[[0] * len(part)]
            x = noised(self.denoiser.parametrization, self.target, part, sigma)
            x0 = self.denoiser.denoise(x, sigma, cond)
            # (x0_pred - x0) / sigma is the error of the noise, or of the velocity: `Denoiser`.
            yield ((x0.to(self.target.dtype) - self.target) / sigma).square().sum()


def _check(
    denoiser: Denoiser,
    target: Tensor,
    start: Conditioning,
    iterations: int,
    lr: float,
    draws: int,
    batch_size: int | None,
) -> None:
    if tuple(target.shape) != tuple(denoiser.latent_shape):
        raise ValueError(
            f"`target` has shape {list(target.shape)}, expected one latent of this network, "
            f"{list(denoiser.latent_shape)}: encode the image at the network's size."
        )
    if len(start) != 1:
        raise ValueError(
            f"`start` must hold one prompt, got {len(start)}: choose one, `start[[0]]`."
        )
    counts = {"iterations": iterations, "draws": draws, "batch_size": batch_size}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not 0 < lr < math.inf:
        raise ValueError(f"`lr` must be above 0 and finite, got {lr}.")
