"""The second stage of detection: do the images of a prompt collapse onto one?

Seeds of a memorized prompt end in one image, those of another prompt in different ones. Sampling
tells what one forward pass cannot, and costs `SEEDS` x `STEPS` guided steps; so the first stage
chooses the most suspicious prompts, and these are judged by their score and their collapse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from ..arrays import Float, Tensor
from .denoiser import Denoiser
from .rates import NotEnoughControls, upper_bound
from .robust import median_and_deviation
from .trajectory import guided_step, not_finite

SEEDS = (0, 1, 2)
STEPS = 10
COND_SCALE = 5.0
SHARE = 0.1
"""Share of ordinary prompts that are sampled."""
CONTROLS = 39
"""That a second stage needs: three of them are sampled, and say what collapses vary by."""


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
def collapses(denoiser: Denoiser, prompts: Sequence[str]) -> list[float]:
    """Return `collapse_of` what each prompt is sampled to from all `SEEDS`.

    Args:
        denoiser: The network.
        prompts: As many as one pass holds, each in `SEEDS` rows.

    Raises:
        PredictionError: A prediction is NaN or infinite; names the prompt.
    """
    sigmas, seeds = denoiser.sigmas(STEPS), len(SEEDS)
    x = denoiser.initial_noise(SEEDS, sigmas[0])
    x = x.repeat(len(prompts), *[1] * (x.ndim - 1))
    cond = denoiser.encode(prompts)[[i for i in range(len(prompts)) for _ in SEEDS]]
    empty = denoiser.unconditional()[[0] * len(x)]
    cond_scale = 1.0 if denoiser.guidance_distilled else COND_SCALE
    for sigma, sigma_next in pairwise(sigmas):
        x0_cond = denoiser.denoise(x, sigma, cond)
        x0_uncond = x0_cond if cond_scale == 1.0 else denoiser.denoise(x, sigma, empty)
        x = guided_step(x, x0_uncond, x0_cond, sigma, sigma_next, cond_scale)
    found = []
    for prompt, own in zip(prompts, x.cpu().split(seeds), strict=True):
        if not own.isfinite().all():
            raise not_finite(f"The latent sampled for the prompt {prompt[:200]!r}", denoiser)
        found.append(collapse_of(own))
    return found


@dataclass(frozen=True, kw_only=True)
class SecondStage:
    """Which prompts are sampled, and how strong the evidence is that ordinary ones give.

    Neither measure is enough on every network: pale images have small scores, and images whose
    grounds vary collapse little. So their logarithms are added, each in units of what it varies by
    among the controls. Sampled prompts rank by this evidence, above all that are not sampled; those
    rank by their score. So the pair of stages is one score, with its order statistic and p-values.
    """

    suspicion: float
    """Scores of the first stage above it are sampled."""
    controls: int
    """How many there were."""
    score_scale: tuple[float, float]
    """Median and spread of the logarithm of the controls' scores."""
    collapse_scale: tuple[float, float]
    """The same of the suspicious controls' collapses."""
    control_evidence: tuple[float, ...]
    """Of the suspicious controls."""
    threshold: float
    """Sampled prompts with more evidence are flagged."""

    @staticmethod
    def require_controls(number: int, rate: float) -> None:
        """Make sure that so many controls make a second stage that can flag a rate.

        Raises:
            NotEnoughControls: They are fewer than `CONTROLS`.
            ValueError: As many are to be flagged as are sampled.
        """
        if number < CONTROLS:
            raise NotEnoughControls(
                f"a second stage needs at least {CONTROLS} controls, found {number}. "
                "Add controls, or leave --collapse out."
            )
        ranks = torch.arange(number, dtype=torch.float64)
        if upper_bound(ranks, rate) <= upper_bound(ranks, SHARE):
            raise ValueError(
                f"The second stage samples {SHARE:.0%} of ordinary prompts and must flag fewer, "
                f"got a rate of {rate:.1%}: lower --false-positive-rate, or leave --collapse out."
            )

    @staticmethod
    def suspicion_of(control_scores: Float[Tensor, " control"], rate: float) -> float:
        """Return the score above which prompts are sampled: `SHARE` of ordinary ones.

        Errors as of `require_controls`.
        """
        SecondStage.require_controls(len(control_scores), rate)
        return upper_bound(control_scores, SHARE)

    @classmethod
    def from_controls(
        cls, scores: Float[Tensor, " control"], collapses: Sequence[float], rate: float
    ) -> "SecondStage":
        """Return the stage that flags a further control with probability at most `rate`.

        Args:
            scores: Of all controls.
            collapses: Of the suspicious ones, NaN for the others.
            rate: Of false positives, of both stages together.
        """
        measured = torch.as_tensor(collapses, dtype=torch.float64)
        sampled = ~measured.isnan()
        stage = cls(
            suspicion=cls.suspicion_of(scores, rate), controls=len(scores),
            score_scale=_scale(scores.log()), collapse_scale=_scale(measured[sampled].log()),
            control_evidence=(), threshold=math.inf,
        )  # fmt: skip
        evidence = stage.evidence(scores, measured)
        return replace(
            stage, control_evidence=tuple(evidence[sampled].tolist()),
            threshold=upper_bound(evidence.nan_to_num(-math.inf), rate),
        )  # fmt: skip

    def evidence(
        self, scores: Float[Tensor, " prompt"], collapses: Float[Tensor, " prompt"]
    ) -> Float[Tensor, " prompt"]:
        """Return the sum of both logarithms in units of their spread; NaN stays NaN."""
        (score, by), (collapse_, collapse_by) = self.score_scale, self.collapse_scale
        return (scores.log() - score) / by + (collapses.log() - collapse_) / collapse_by

    def p_values(self, evidence: Float[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
        """Return per sampled prompt (1 + controls with as much evidence) / (controls + 1)."""
        known = torch.tensor(self.control_evidence, dtype=torch.float64).sort().values
        at_least = len(known) - torch.searchsorted(known, evidence.contiguous())
        return (1 + at_least).double() / (self.controls + 1)


def _scale(values: Float[Tensor, " value"]) -> tuple[float, float]:
    median, deviation = median_and_deviation(values, torch.finfo(torch.float32).eps)
    return median.item(), deviation.item()
