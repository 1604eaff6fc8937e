"""Detection that stops drawing seeds for a prompt once its verdict is settled.

The rule. On the controls, of which all seeds are known, take the ratio of the mean over all seeds
to its estimate from the first k. Most controls keep that ratio inside a band [low, high]. A prompt
with estimate e after k seeds is settled

    flagged      when  e * low  > threshold    (also the lowest final mean would be flagged),
    not flagged  when  e * high <= threshold   (also the highest would not).

The two ends are order statistics with conservative ranks, each at error / (2 * (seeds - 1)): by
exchangeability and the union bound, a prompt like the controls ends with another verdict than all
its seeds would have given with probability at most `error`. For memorized prompts the ratio, being
free of scale, is assumed to vary no more than on controls; measure that, it is not guaranteed.
An error of 0 draws every seed, and a larger error never draws more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .arrays import Float, Tensor
from .calibration import Calibration
from .denoiser import Denoiser
from .detection import Detection, DetectionConfig, OnResult, Progress, mean_over_seeds, report
from .trajectory import Run, encode


@dataclass(frozen=True, kw_only=True, eq=False)
class SettlingRule:
    """When a verdict needs no further seed."""

    threshold: float
    """Scores above it are flagged (L2, latent units)."""
    low: Float[Tensor, " drawn"]
    """Final mean over estimate, lower end of the band after 1, 2, ... seeds; at most 1."""
    high: Float[Tensor, " drawn"]
    """Upper end; at least 1."""

    @classmethod
    def from_controls(
        cls, control_scores: Float[Tensor, " control seed"], threshold: float, error: float
    ) -> "SettlingRule":
        """Return the rule whose bands hold on `control_scores` at `error` (0 to 1)."""
        if not 0 <= error <= 1:
            raise ValueError(f"`error` must be between 0 and 1, got {error}.")
        number, seeds = control_scores.shape
        levels, low, high = control_scores.mean(0), [], []
        # Rank of the order statistic that a further control exceeds with the given probability.
        rank = math.ceil((number + 1) * (1 - error / (2 * max(1, seeds - 1))))
        for drawn in range(1, seeds):
            partial = control_scores.clone()
            partial[:, drawn:] = torch.nan
            ratio = control_scores.mean(1) / mean_over_seeds(partial, levels)
            # Nothing is known of a control that scores 0: it stands at both far ends.
            bottom, top = ratio.nan_to_num(0.0).sort().values, ratio.nan_to_num(torch.inf).sort().values
            low.append(min(1.0, bottom[number - rank].item()) if rank <= number else 0.0)
            high.append(max(1.0, top[rank - 1].item()) if rank <= number else math.inf)
        return cls(
            threshold=threshold,
            low=torch.tensor(low, dtype=torch.float64),
            high=torch.tensor(high, dtype=torch.float64),
        )

    def settled(self, estimates: Float[Tensor, " prompt"], drawn: int) -> Tensor:
        """Return which prompts need no further seed after `drawn` of them, bool [prompt]."""
        if drawn > len(self.low):
            return torch.ones_like(estimates, dtype=torch.bool)
        flagged = estimates * self.low[drawn - 1] > self.threshold
        return flagged | (estimates * self.high[drawn - 1] <= self.threshold)


def detect_sequentially(
    denoiser: Denoiser,
    prompts: Sequence[str],
    config: DetectionConfig,
    calibration: Calibration,
    *,
    error: float = 0.05,
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
        progress: As for `detect`.

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
    run, known, levels = Run(denoiser, config), known or {}, controls.mean(0)
    chunk = max(64, min(256, 4 * run.rows))
    shape = (len(prompts), len(config.seeds), config.steps)
    traces = torch.full(shape, torch.nan, dtype=torch.float64)
    for start in range(0, len(prompts), chunk):
        indices = range(start, min(start + chunk, len(prompts)))
        if not all(i in known for i in indices):
            texts = prompts[start : start + chunk]
            traces[start : start + chunk] = _draw(run, texts, rule, levels)
        report(indices, traces, known, on_result)
        if progress is not None:
            progress(len(indices))
    return Detection(
        prompts=tuple(prompts),
        traces=traces,
        latent_elements=math.prod(denoiser.latent_shape),
        config=config,
        seed_levels=levels,
    )


def _draw(
    run: Run, texts: Sequence[str], rule: SettlingRule, levels: Tensor
) -> Float[Tensor, " prompt seed step"]:
    """Return the traces of one chunk, seed after seed, dropping what is settled."""
    seeds = len(run.config.seeds)
    traces = torch.full((len(texts), seeds, run.config.steps), torch.nan, dtype=torch.float64)
    cond, unsettled = encode(run.denoiser, texts), list(range(len(texts)))
    for seed in range(seeds):
        traces[unsettled, seed] = run.traces(texts, cond, unsettled, [seed] * len(unsettled))
        estimates = mean_over_seeds(traces[unsettled].mean(2), levels)
        settled = rule.settled(estimates, seed + 1).tolist()
        unsettled = [i for i, done in zip(unsettled, settled, strict=True) if not done]
        if not unsettled:
            break
    return traces
