"""Detection that stops drawing seeds for a prompt once its verdict is settled.

The rule. On the controls, of which all seeds are known, take r_k, the ratio of the mean over all S
seeds to its estimate from the first k. Were seeds independent, log r_k would spread in proportion
to s_k = sqrt(1 / k - 1 / S); so each control is given one number, the largest |log r_k| / s_k over
k. Its order statistic of rank ceil((n + 1) * (1 - error)) is q, and a prompt with estimate e after
k seeds is settled

    flagged      when  e * exp(-q * s_k) >  threshold   (the lowest final mean would be flagged),
    not flagged  when  e * exp(+q * s_k) <= threshold   (the highest would not), and e is usual.

By exchangeability, a prompt like the controls leaves its band at any k, and can therefore end with
another verdict than all its seeds would have given, with probability at most `error`; s_k shapes
the band and need not be right for that. Memorized prompts vary more: one noise level may tell all.
So a prompt whose estimate is higher than that of 95 % of the controls is never settled as not
flagged. An error of 0 draws every seed, and a larger error never draws more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..arrays import Float, Tensor
from .calibration import Calibration
from .config import DetectionConfig
from .denoiser import Denoiser
from .detection import Detection, OnResult, Progress, emit, mean_over_seeds
from .trajectory import Trajectory, encode

UNUSUAL = 0.05
"""Share of controls whose estimate is so high that a prompt with it is not settled as ordinary."""


@dataclass(frozen=True, kw_only=True)
class SettlingRule:
    """When a verdict needs no further seed."""

    threshold: float
    """Scores above it are flagged."""
    spread: float
    """q: how far, in units of s_k, the final mean may lie from the estimate, on a log scale."""
    seeds: int
    """S: how many there are to draw."""
    usual: tuple[float, ...]
    """[k - 1] Estimates after k seeds that all but `UNUSUAL` of the controls stay below."""

    @classmethod
    def from_controls(
        cls, control_scores: Float[Tensor, " control seed"], threshold: float, error: float
    ) -> "SettlingRule":
        """Return the rule whose band further controls leave with probability at most `error`."""
        if not 0 <= error <= 1:
            raise ValueError(f"`error` must be between 0 and 1, got {error}.")
        number, seeds = control_scores.shape
        levels, farthest = control_scores.median(0).values, torch.zeros(number, dtype=torch.float64)
        usual: list[float] = []
        for drawn in range(1, seeds):
            partial = control_scores.clone()
            partial[:, drawn:] = torch.nan
            estimates = mean_over_seeds(partial, levels)
            usual.append(estimates.quantile(1 - UNUSUAL).item())
            ratio = control_scores.mean(1) / estimates
            # A control that scores 0 tells nothing of its ratio: it stands at the far end.
            distance = (ratio.log().abs() / _shape(drawn, seeds)).nan_to_num(torch.inf)
            farthest = farthest.maximum(distance)
        rank = max(1, math.ceil((number + 1) * (1 - error)))
        spread = farthest.sort().values[rank - 1].item() if rank <= number else math.inf
        return cls(threshold=threshold, spread=spread, seeds=seeds, usual=tuple(usual))

    def settled(self, estimates: Float[Tensor, " prompt"], drawn: int) -> Tensor:
        """Return which prompts need no further seed after `drawn` of them, bool [prompt]."""
        if drawn >= self.seeds:
            return torch.ones_like(estimates, dtype=torch.bool)
        if self.spread == math.inf:
            return torch.zeros_like(estimates, dtype=torch.bool)
        factor = math.exp(self.spread * _shape(drawn, self.seeds))
        ordinary = estimates <= self.usual[drawn - 1]
        not_flagged = ordinary & (estimates * factor <= self.threshold)
        return (estimates / factor > self.threshold) | not_flagged


def _shape(drawn: int, seeds: int) -> float:
    """Return s_k: the std of the mean of all seeds minus that of the first k, each of std 1."""
    return math.sqrt(1 / drawn - 1 / seeds)


def detect_sequentially(
    denoiser: Denoiser,
    prompts: Sequence[str],
    config: DetectionConfig,
    calibration: Calibration,
    *,
    error: float = 0.02,
    known: Mapping[int, Tensor] | None = None,
    on_result: OnResult | None = None,
    progress: Progress | None = None,
) -> Detection:
    """Score prompts with as few of the config's seeds as their verdicts need.

    All prompts of a chunk get the first seed, the unsettled ones the second, and so on.

    Args:
        denoiser: The network the calibration was made on.
        prompts: Any strings.
        config: What to measure; seeds and steps as in the calibration.
        calibration: Gives the threshold and the controls' scores per seed.
        error: Highest probability that a prompt like the controls gets another verdict than
            all seeds would have given it.
        known: Traces by index, as for `detect`.
        on_result: As for `detect`; traces are NaN at seeds that were not drawn.
        progress: Called with the number of seeds that are drawn or no longer needed since the last
            call, of as many as prompts times seeds; after each forward pass.

    Returns:
        Traces with NaN for seeds not drawn; `scores` estimates the mean over all seeds.

    Raises:
        ValueError: The calibration has another number of seeds.
        PredictionError: A prediction is NaN or infinite; names the prompt.
    """
    controls = calibration.seed_scores
    if controls.shape[1] != len(config.seeds):
        raise ValueError(
            f"The calibration has {controls.shape[1]} seeds and this run {len(config.seeds)}: "
            f"calibrate again with seeds {list(config.seeds)}."
        )
    rule = SettlingRule.from_controls(controls, calibration.threshold, error)
    trajectory = Trajectory(denoiser, config, calibration.basis)
    known, levels = known or {}, controls.median(0).values
    chunk = max(64, min(256, 4 * trajectory.rows))
    shape = (len(prompts), len(config.seeds), config.steps)
    traces = torch.full(shape, torch.nan, dtype=torch.float64)
    for start in range(0, len(prompts), chunk):
        indices = range(start, min(start + chunk, len(prompts)))
        if not all(i in known for i in indices):
            texts = prompts[start : start + chunk]
            traces[start : start + chunk] = _draw(trajectory, texts, rule, levels, progress)
        elif progress is not None:
            progress(len(indices) * len(config.seeds))
        emit(indices, traces, known, on_result)
    return Detection(
        prompts=tuple(prompts),
        traces=traces,
        latent_elements=math.prod(denoiser.latent_shape),
        config=config,
        seed_levels=levels,
    )


def _draw(
    trajectory: Trajectory, texts: Sequence[str], rule: SettlingRule, levels: Tensor,
    progress: Progress | None,
) -> Float[Tensor, " prompt seed step"]:  # fmt: skip
    """Return the traces of one chunk, seed after seed, dropping what is settled."""
    seeds, steps = len(trajectory.config.seeds), trajectory.config.steps
    traces = torch.full((len(texts), seeds, steps), torch.nan, dtype=torch.float64)
    cond, unsettled = encode(trajectory.denoiser, texts), list(range(len(texts)))
    for seed in range(seeds):
        waiting = unsettled
        while waiting:
            batch, waiting = waiting[: trajectory.rows], waiting[trajectory.rows :]
            traces[batch, seed] = trajectory.traces(texts, cond, batch, [seed] * len(batch))
            if progress is not None:
                progress(len(batch))
        estimates = mean_over_seeds(traces[unsettled].mean(2), levels)
        settled = rule.settled(estimates, seed + 1).tolist()
        if progress is not None:
            progress(sum(settled) * (seeds - seed - 1))
        unsettled = [i for i, done in zip(unsettled, settled, strict=True) if not done]
        if not unsettled:
            break
    return traces
