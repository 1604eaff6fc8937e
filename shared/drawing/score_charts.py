"""Charts of scores for pages: per denoising step, and audited prompts beside controls."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .chart import Axis, Chart, Shape, round_step, round_ticks
from .theme import Theme
from .typeset import Number

if TYPE_CHECKING:
    from PIL.Image import Image

LETTERS = 26
"""Pixels of the letters; pages show these charts at half their size."""
COLUMN = 20
"""Pixels of the chart's width in which scores are stacked."""


def steps_axis(levels: int) -> Axis:
    """Return the x axis of a chart that has one place per denoising step, counted from 1."""
    ticks = [(1.0, "1"), *round_ticks(2, max(levels, 2), 8, whole=True)]
    ticks = [tick for tick in ticks if tick[0] <= levels]
    return Axis(label="sampling step, noisiest first", low=0.5, high=levels + 0.5, ticks=ticks)


def scores_axis(highest: Number) -> Axis:
    """Return the y axis of a chart whose greatest score is `highest`, from 0."""
    step = round_step((highest or 1.0) / 4)
    top = step * np.ceil((highest or 1.0) * 1.02 / step)
    return Axis(label="score (L2, latent units)", low=0, high=top, ticks=round_ticks(0, top, 5))


def score_traces(
    traces: Any, *, threshold: Number | None = None, theme: Theme = "light", width: int = 800
) -> "Image":
    """Return the score per denoising step: one thin line a seed, their mean bold.

    Args:
        traces: [seed step] L2 norms in latent units; NaN where nothing was measured.
        threshold: For scores averaged over these steps; drawn as a line.
        theme: Colours.
        width: Pixels.
    """
    array = np.asarray(traces, dtype=float)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"`traces` must be [seed step] and not empty, got shape {array.shape}.")
    highest = max(np.nanmax(array, initial=0), threshold or 0)
    steps, y = steps_axis(array.shape[1]), scores_axis(highest)
    chart = Chart(steps, y, width=width, height=round(0.55 * width), size=LETTERS, theme=theme)
    places = range(1, array.shape[1] + 1)
    for row in array:
        chart.line(zip(places, row, strict=True), "other", width=0.08, opacity=0.5)
    counts = np.isfinite(array).sum(0)
    sums = np.nansum(array, 0)
    mean = np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    chart.line(zip(places, mean, strict=True), "flagged", width=0.17)
    chart.dots(zip(places, mean, strict=True), "flagged", radius=0.24)
    if threshold is not None:
        chart.line([(steps.low, threshold), (steps.high, threshold)], "ink", width=0.1)
        chart.key([("line", "ink", 1.0, "threshold")])
    return chart.image()


def score_distribution(
    scores: Sequence[Number] | np.ndarray,
    flagged: Sequence[bool] | np.ndarray,
    control_scores: Sequence[Number] | np.ndarray,
    threshold: Number | None,
    *,
    audited: str = "audited",
    theme: Theme = "light",
    width: int = 1760,
) -> "Image":
    """Return a dot per audited prompt and per control, and the threshold between them.

    Args:
        scores: Of the audited prompts.
        flagged: Whether each is above the threshold; these are diamonds.
        control_scores: Of the control prompts, same unit.
        threshold: Same unit, drawn as an upright line; None when there is none.
        audited: What stands beside the dots of the audited prompts.
        theme: Colours.
        width: Pixels.
    """
    own, controls = (np.asarray(v, dtype=float) for v in (scores, control_scores))
    hits = np.asarray(flagged, dtype=bool)
    if own.shape != hits.shape:
        raise ValueError(f"{len(own)} `scores` but {len(hits)} `flagged`.")
    every = np.concatenate([own, controls, [] if threshold is None else [threshold]])
    every = every[np.isfinite(every)]
    if not every.size:
        raise ValueError("There is no finite score to draw.")
    x = _range_axis(float(every.min()), float(every.max()), most=width // 120)
    y = Axis(label="", low=-0.1, high=2.15, ticks=[(0, "controls"), (1, audited)])
    height = max(640, round(0.46 * width))
    chart = Chart(x, y, width=width, height=height, size=LETTERS, theme=theme)
    radius = float(np.clip(4.1 / max(len(own) + len(controls), 1) ** 0.5, 0.12, 0.27))
    own_heights, control_heights = (
        base + _stack([x.part(value) for value in values], width // COLUMN)
        for base, values in ((1.05, own), (0.05, controls))
    )
    for values, heights, role in (
        (controls, control_heights, "control"),
        (own[~hits], own_heights[~hits], "other"),
        (own[hits], own_heights[hits], "flagged"),
    ):
        shape: Shape = "diamond" if role == "flagged" else "disc"
        size = 1.25 * radius if role == "flagged" else radius
        chart.dots(zip(values, heights, strict=True), role, radius=size, shape=shape, opacity=0.85)
    if threshold is not None:
        chart.upright(threshold, f"threshold {threshold:.4g}")
    return chart.image()


def _range_axis(low: Number, high: Number, most: int) -> Axis:
    """Return an axis with some room at both ends; logarithmic where scores span a wide range."""
    log = low > 0 and high / low > 30
    margin = 0.04 * (high - low) or 1.0
    ends = (max(low - margin, low / 1.2) if low > 0 else low - margin), high + margin
    ticks = round_ticks(*ends, most, log=log)
    return Axis(label="score", low=ends[0], high=ends[1], ticks=ticks,
                log=log)  # fmt: skip


def _stack(parts: Sequence[Number], columns: int) -> np.ndarray:
    """Return heights in 0..0.9: what falls into one column of an axis stands on each other."""
    places = np.nan_to_num(np.multiply(parts, columns), posinf=columns, neginf=0).astype(int)
    ranks, seen = np.zeros(len(parts)), dict[int, int]()
    # By chance, always the same: in the order of the values each column would lean to the right.
    for index in np.random.default_rng(0).permutation(len(parts)):
        column = places[index]
        ranks[index] = seen[column] = seen.get(column, -1) + 1
    return ranks * min(0.06, 0.9 / max(ranks.max(initial=0), 1))
