"""Initial noise: start where the prompt pulls less.

Han et al., NeurIPS 2025, arXiv:2510.08625.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..score.denoiser import Conditioning, Denoiser
from ..score.metrics import text_noise, text_noise_norm
from ..score.noise_levels import noise_scale
from ..score.trajectory import not_finite
from .method import Method, Mitigation, Start, Step
from .optimisation import (
    Optimised,
    batches,
    check_descent,
    descend,
    find_target,
    gradients,
)

ITERATIONS = {"per_sample": 50, "batch": 2}
"""By mode, when the setting is None."""
PAPER_ELEMENTS = 4 * 64 * 64
"""Of one latent of SD 1.4, which the paper's radius belongs to."""


@dataclass(frozen=True, kw_only=True)
class InitialNoise(Method):
    """Move the initial noise to where |D| is smaller.

    Noise is counted here with unit variance, as the paper does. Modified: every image's noise is
    scaled back to the L2 norm it was drawn with, because a Gaussian of this many elements has a
    norm that hardly varies, and a shorter one makes flat images.
    """

    name: ClassVar[str] = "initial_noise"

    mode: str = "per_sample"
    """"per_sample": AdamW on |D|, through both predictions since x moves;
    "batch": x <- x - gamma (D(x + radius D / |D|) - D(x)), without gradients (paper, Alg. 1)."""
    iterations: int | None = None
    """Steps of either mode, at least 0; None takes 50 per sample (authors' code: at most 1000) and
    2 in batch mode (theirs, too). 0 leaves the noise as it is."""
    learning_rate: float = 0.01
    """Per sample: of AdamW, above 0 (authors' README: lr, 0.01)."""
    target: float | None = None
    """Per sample: |D| to stop at, L2 norm in latent units, at least 0 (authors' README: 0.9 on
    SD 1.4). It depends on model and resolution; None takes `target_quantile`."""
    target_quantile: float = 0.8
    """Share of the calibration's control scores below the target, 0..1; ours, not the paper's."""
    gamma: float = 0.7
    """Batch: size of a step, at least 0 (authors' README: 0.7)."""
    radius: float = 50.0
    """Batch: rho, how far to look along D, L2 norm for latents of 16,384 elements and scaled with
    the root of their number, above 0 (authors' README: 50)."""
    steps_without_guidance: int = 5
    """Batch: first network calls that follow the unconditional prediction, at least 0 (authors'
    README: apply_cfg_step 4, which is 5 of 50 steps)."""
    batch_size: int | None = None
    """Rows of one pass, at least 1; None chooses by device and latent size."""
    checkpointing: bool = False
    """Per sample: recompute activations instead of keeping them: less memory, more time."""

    def __post_init__(self) -> None:
        if self.mode not in ITERATIONS:
            raise ValueError(f"`mode` must be one of {', '.join(ITERATIONS)}, got {self.mode!r}.")
        check_descent(self.learning_rate, self.target, self.target_quantile, self.batch_size)
        for name in ("iterations", "steps_without_guidance", "gamma"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        if not (self.radius > 0 and math.isfinite(self.radius)):
            raise ValueError(f"`radius` must be above 0, got {self.radius}.")

    def start(self, start: Start) -> Mitigation:
        """Return the better noise.

        Raises:
            ValueError: Per sample, there is nothing to take the target from.
            PredictionError: A prediction or gradient is not finite.
        """
        if self.mode == "per_sample":
            return self._per_sample(start)
        return Unguided(self.steps_without_guidance, x=self._batch(start))

    def _iterations(self) -> int:
        return ITERATIONS[self.mode] if self.iterations is None else self.iterations

    def _per_sample(self, start: Start) -> Optimised:
        target = find_target(start, self.target, self.target_quantile)
        unit = _unit(start)
        with gradients(start.network, checkpointing=self.checkpointing):
            run = _TextNoise(start)

            def magnitude(rows: list[int], z: Tensor) -> Tensor:
                x0_uncond, x0_cond = run.predict(z * unit, run.cond[rows])
                return text_noise_norm(x0_cond, x0_uncond) / run.sigma

            best = descend(
                list(run.x / unit),
                magnitude,
                target=target,
                learning_rate=self.learning_rate,
                iterations=self._iterations(),
                denoiser=start.denoiser,
                batch_size=self.batch_size,
                keep_norm=True,
            )
            # What did not move comes back bit for bit.
            x = run.x + unit * (best.rows - run.x / unit)
        return Optimised(best, x=x)

    @torch.no_grad()
    def _batch(self, start: Start) -> Tensor:
        run, unit, parts = _TextNoise(start), _unit(start), []
        radius = self.radius * math.sqrt(start.x[0].numel() / PAPER_ELEMENTS)
        for batch in batches(start.denoiser, len(run.x), self.batch_size):
            x, here = run.x[batch], run.cond[batch]
            known, norm = start.x0_uncond[batch], _norm(x)
            for _ in range(self._iterations()):
                at_x = run.text_noise(x, here, known)
                ahead = x + unit * radius * at_x / _norm(at_x).clamp(min=1e-12)
                x = x - unit * self.gamma * (run.text_noise(ahead, here) - at_x)
                x, known = x * norm / _norm(x), None
            if not x.isfinite().all():
                raise not_finite("The initial noise in batch mode", start.denoiser)
            parts.append(x)
        return torch.cat(parts)


class Unguided(Mitigation):
    """Another start, and no guidance for the first network calls."""

    def __init__(self, calls: int, *, x: Tensor):
        super().__init__(x=x)
        self.calls = calls

    def guide(self, step: Step) -> Tensor | None:
        """Return the unconditional prediction at first."""
        return step.guided(0.0) if step.index < self.calls else None


class _TextNoise:
    """Both predictions at a moving x; everything of it is fit for a graph."""

    def __init__(self, start: Start):
        self.denoiser: Denoiser = start.denoiser
        self.cond, self.empty = start.cond.detached(), start.denoiser.unconditional().detached()
        self.x, self.sigma = start.x.detach().clone(), start.sigma.detach().clone()

    def predict(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """Return the unconditional and the conditional x0-prediction."""
        x0_uncond = self.denoiser.denoise(x, self.sigma, self.empty[[0] * len(x)])
        return x0_uncond, self.denoiser.denoise(x, self.sigma, cond)

    def text_noise(self, x: Tensor, cond: Conditioning, x0_uncond: Tensor | None = None) -> Tensor:
        """Return D; the unconditional prediction is computed unless it is known."""
        if x0_uncond is None:
            return text_noise(*self.predict(x, cond), self.sigma)
        return text_noise(x0_uncond, self.denoiser.denoise(x, self.sigma, cond), self.sigma)


def _unit(start: Start) -> float:
    """Return the scale of x at which the initial noise has unit variance."""
    return noise_scale(start.denoiser.parametrization, float(start.sigma))


def _norm(x: Tensor) -> Tensor:
    """Return the L2 norm per row, to multiply rows with."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
