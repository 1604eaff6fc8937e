"""How well scores tell captions apart: AUC, TPR at 1 % false positives, calibrated rates."""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from figures import Figure
from torch import Tensor
from unmemorize.shared.score.rates import clopper_pearson, controls_needed, threshold_of

RATE = 0.01
"""Of false positives."""
BOOTSTRAPS = 1000
TAILS = (0.025, 0.975)


class Draw(NamedTuple):
    """Scores by one choice of seeds and controls."""

    scores: Tensor
    """[caption] Of all captions of a model."""
    controls: Tensor | None = None
    """[control] Of the controls, as their calibration has them; None where none is asked for."""


def tpr_at(rate: float, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Return the true-positive rate at the lowest threshold with at most `rate` false positives.

    Args:
        rate: In 0..1.
        positives: [*draw caption].
        negatives: [*draw caption].
    """
    count = negatives.shape[-1]
    place = count - 1 - math.floor(rate * count + 1e-9)  # 300 * .01 is 3
    limit = np.partition(negatives, place, axis=-1)[..., place]
    return (positives > limit[..., None]).mean(-1)


def ranked(
    draws: Sequence[Draw], positives: Sequence[int], negatives: Sequence[int]
) -> dict[str, Figure]:
    """Return AUC and TPR at 1 % false positives, each a mean over the draws.

    Intervals, 95 %, are bootstraps over captions, positives and negatives apart. That of the TPR
    also takes in its Clopper-Pearson interval: where all are found, resampling finds all.
    """
    values = [draw.scores.double().numpy() for draw in draws]
    pairs = [(scores[list(positives)], scores[list(negatives)]) for scores in values]
    wins = np.mean([_wins(*pair) for pair in pairs], axis=0)
    picks = _picks(*wins.shape)
    high, low = (
        np.stack([np.bincount(row, minlength=size) for row in pick]) / size
        for pick, size in zip(picks, wins.shape, strict=True)
    )
    aucs = np.quantile((high @ wins * low).sum(1), TAILS)
    tpr = float(np.mean([tpr_at(RATE, *pair) for pair in pairs]))
    tprs = np.quantile(
        np.mean([tpr_at(RATE, p[picks[0]], n[picks[1]]) for p, n in pairs], axis=0), TAILS
    )
    exact = _interval(tpr, len(positives))
    return {
        "auc": Figure(float(wins.mean()), float(aucs[0]), float(aucs[1]), sum(wins.shape)),
        "tpr_at_1pct_fpr": Figure(
            tpr, min(float(tprs[0]), exact[0]), max(float(tprs[1]), exact[1]), len(positives)
        ),
    }


def flagged(draws: Sequence[Draw], captions: Sequence[int]) -> Figure | None:
    """Return the share of captions above a threshold calibrated at 1 %, a mean over the draws.

    None when the controls cannot support that rate. The interval is Clopper-Pearson's.
    """
    if any(d.controls is None or len(d.controls) < controls_needed(RATE) for d in draws):
        return None
    rates = [
        (d.scores[list(captions)] > threshold_of(d.controls.double(), RATE)).double().mean().item()
        for d in draws
    ]
    rate = float(np.mean(rates))
    return Figure(rate, *_interval(rate, len(captions)), len(captions))


def measured(
    draws: Sequence[Draw], positives: Sequence[int], negatives: Sequence[int]
) -> dict[str, Figure]:
    """Return `ranked`, and the false-positive rate where the controls support one."""
    rate = flagged(draws, negatives)
    return ranked(draws, positives, negatives) | ({"false_positive_rate": rate} if rate else {})


def _interval(share: float, n: int) -> tuple[float, float]:
    """Return Clopper-Pearson's interval of a share that may be a mean over draws."""
    hits = share * n
    return (
        clopper_pearson(math.floor(hits + 1e-9), n)[0],
        clopper_pearson(math.ceil(hits - 1e-9), n)[1],
    )


def _wins(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Return [positive negative]: 1 where the positive scores higher, .5 where both are equal."""
    first, second = positives[:, None], negatives[None]
    return (first > second) + 0.5 * (first == second)


@cache
def _picks(positives: int, negatives: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which captions each resampling takes, [resampling caption] of either side."""
    draw = np.random.default_rng(0)
    return (
        draw.integers(positives, size=(BOOTSTRAPS, positives)),
        draw.integers(negatives, size=(BOOTSTRAPS, negatives)),
    )
