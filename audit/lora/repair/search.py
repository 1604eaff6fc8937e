"""How much of a LoRA can stay: each method's path is searched for where nothing comes back."""

from collections.abc import Callable, Iterator

from .case import Path
from .result import Trial
from .weights import Factors

HALVINGS = 4
"""Of the interval that holds the largest part that may be left."""
Judge = Callable[[float, Factors], Trial]


def search(path: Path, judge: Judge, halvings: int = HALVINGS) -> Iterator[tuple[Trial, Factors]]:
    """Yield trials along a path; those that give nothing back rise in what they leave.

    What comes back need not rise with what is left. So a trial that gives nothing back stands for
    itself alone, and the largest of them is the largest that was tried, not that there is.

    Args:
        path: Of a method; where it begins (0) is tried first and ends the search if images come
            back from there.
        judge: Measures a trial.
        halvings: Trials between the two ends.
    """
    factors = path(0.0)
    first = judge(0.0, factors)
    yield first, factors
    if first.back.count:
        return
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        factors = path(middle)
        trial = judge(middle, factors)
        yield trial, factors
        if trial.back.count:
            high = middle
        else:
            low = middle
