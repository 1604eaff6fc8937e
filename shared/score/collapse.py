"""The second stage of detection: do the images of a prompt collapse onto one?

Seeds of a memorized prompt end in one image, those of another prompt in different ones. Sampling
tells what one forward pass cannot, and costs `SEEDS` x `STEPS` guided steps; so the first stage
chooses the most suspicious prompts, and these are judged by their collapse alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..arrays import Float, Tensor
from .denoiser import Denoiser
from .rates import upper_bound
from .trajectory import guided_step, not_finite

SEEDS = (0, 1, 2)
STEPS = 10
COND_SCALE = 5.0
SHARE = 0.15
"""Share of ordinary prompts that are sampled."""


def collapse_of(latents: Float[Tensor, " seed *latent height width"]) -> float:
    """Return the spatial variance of the seeds' mean over the variance between seeds (> 0).

    Images that vary little between seeds because they are pale have a pale mean as well, which the
    numerator takes out.
    """
    latents = latents.double()
    within = latents.mean(0).flatten(-2).var(-1).mean()
    between = latents.var(0).mean()
    return (within / between.clamp_min(torch.finfo(torch.float32).tiny)).item()


@torch.inference_mode()
def collapse(denoiser: Denoiser, prompt: str) -> float:
    """Return `collapse_of` what a prompt is sampled to from all `SEEDS`.

    Raises:
        PredictionError: A prediction is NaN or infinite; names the prompt.
    """
    sigmas = denoiser.sigmas(STEPS)
    x = denoiser.initial_noise(SEEDS, sigmas[0])
    rows = [0] * len(x)
    cond, empty = denoiser.encode([prompt])[rows], denoiser.unconditional()[rows]
    cond_scale = 1.0 if denoiser.guidance_distilled else COND_SCALE
    for sigma, sigma_next in pairwise(sigmas):
        x0_cond = denoiser.denoise(x, sigma, cond)
        x0_uncond = x0_cond if cond_scale == 1.0 else denoiser.denoise(x, sigma, empty)
        x = guided_step(x, x0_uncond, x0_cond, sigma, sigma_next, cond_scale)
    if not x.isfinite().all():
        raise not_finite(f"The latent sampled for the prompt {prompt[:200]!r}", denoiser)
    return collapse_of(x)


@dataclass(frozen=True, kw_only=True)
class SecondStage:
    """Which prompts are sampled, and how far those of ordinary prompts collapse.

    Prompts that are sampled rank by their collapse, above all that are not; those rank by their
    score. So the pair of stages is one score, with the order statistic and the p-values of one.
    """

    suspicion: float
    """Scores of the first stage above it are sampled."""
    controls: int
    """How many there were."""
    control_collapses: tuple[float, ...]
    """Of the suspicious controls."""
    threshold: float
    """Sampled prompts with a collapse above it are flagged."""

    @staticmethod
    def suspicion_of(control_scores: Float[Tensor, " control"], rate: float) -> float:
        """Return the score above which prompts are sampled: `SHARE` of ordinary ones.

        Raises:
            ValueError: More than that share is to be flagged.
        """
        if rate > SHARE:
            raise ValueError(
                f"The second stage samples {SHARE:.0%} of ordinary prompts and cannot flag "
                f"{rate:.0%} of them: lower --false-positive-rate, or leave --collapse out."
            )
        return upper_bound(control_scores, SHARE)

    @classmethod
    def from_controls(
        cls, suspicion: float, controls: int, collapses: Sequence[float], rate: float
    ) -> "SecondStage":
        """Return the stage that flags a further control with probability at most `rate`.

        Args:
            suspicion: From `suspicion_of`.
            controls: How many there are.
            collapses: Of those above `suspicion`.
            rate: Of false positives, of both stages together.
        """
        unsampled = torch.full((controls - len(collapses),), -math.inf, dtype=torch.float64)
        ranked = torch.cat([unsampled, torch.tensor(collapses, dtype=torch.float64)])
        threshold = upper_bound(ranked, rate)
        return cls(
            suspicion=suspicion, controls=controls, control_collapses=tuple(collapses),
            # Fewer suspicious controls than may be flagged: what they reach is flagged.
            threshold=max(threshold, 0.0),
        )  # fmt: skip

    def p_values(self, collapses: Float[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
        """Return per sampled prompt (1 + controls that collapse as far) / (controls + 1)."""
        known = torch.tensor(self.control_collapses, dtype=torch.float64).sort().values
        at_least = len(known) - torch.searchsorted(known, collapses.double().contiguous())
        return (1 + at_least).double() / (self.controls + 1)
