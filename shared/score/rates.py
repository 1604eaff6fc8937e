"""What a number of controls says about a false-positive rate."""

import math
from fractions import Fraction

from ..arrays import Float, Tensor

CONFIDENCE = 0.95


class NotEnoughControls(ValueError):
    """Too few controls for the requested false-positive rate."""


def clopper_pearson(hits: int, n: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a rate of which `hits` of `n` were seen, both in 0..1."""
    from scipy.stats import binomtest

    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"`hits` must be between 0 and `n`, `n` at least 1; got {hits} of {n}.")
    interval = binomtest(hits, n).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def controls_needed(false_positive_rate: float) -> int:
    """Return the smallest number of controls that can support a rate: n + 1 >= 1 / rate."""
    return math.ceil(1 / _exact(false_positive_rate)) - 1


def _exact(rate: float) -> Fraction:
    if not 0 < rate < 1:
        raise ValueError(f"`false_positive_rate` must lie between 0 and 1, got {rate}.")
    return Fraction(repr(float(rate)))  # .01 as written: 100 * .01 must be 1


def require_controls(number: int, false_positive_rate: float) -> None:
    """Make sure that so many controls can support a rate.

    Raises:
        NotEnoughControls: They cannot.
        ValueError: The rate is out of range.
    """
    if number < controls_needed(false_positive_rate):
        raise NotEnoughControls(
            f"not enough controls for this claim: a false-positive rate of {false_positive_rate} "
            f"needs at least {controls_needed(false_positive_rate)} different controls, found "
            f"{number}. Add controls, or allow a higher rate with --false-positive-rate."
        )


def threshold_of(scores: Float[Tensor, " control"], false_positive_rate: float) -> float:
    """Return `upper_bound` of the controls' scores; errors as of `require_controls`."""
    require_controls(len(scores), false_positive_rate)
    return upper_bound(scores, false_positive_rate)


def upper_bound(scores: Float[Tensor, " control"], rate: float) -> float:
    """Return the score that a further control exceeds with probability at most `rate`.

    The order statistic of rank ceil((n + 1) * (1 - rate)); needs `controls_needed` scores.
    """
    rank = math.ceil((len(scores) + 1) * (1 - _exact(rate)))
    return scores.sort().values[rank - 1].item()
