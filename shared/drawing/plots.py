"""Plots of scores as SVG, and the colours that all pictures share, for light and dark pages."""

import math
import re
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..dependencies import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]
THEMES: dict[Theme, dict[str, str]] = {
    "light": {
        "page": "#ffffff", "ink": "#1d1f21", "muted": "#5b6066", "line": "#d9d6d0",
        "strong": "#f0893a", "flagged": "#b8450c", "other": "#4f7fa8", "control": "#8b9096",
    },
    "dark": {
        "page": "#1d2024", "ink": "#f4f1ec", "muted": "#a9aeb5", "line": "#3a3f46",
        "strong": "#a04a08", "flagged": "#ff9a5c", "other": "#7fb2dc", "control": "#858b93",
    },
}  # fmt: skip
"""Colours by role. `strong` is the background of the most significant word."""
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the date, above all
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


def score_trace_figure(
    traces: Any, *, threshold: float | None = None, theme: Theme = "light", width: float = 6.4
) -> str:
    """Return an SVG of the score per denoising step: one thin line a seed, their mean bold.

    Args:
        traces: [seed step] L2 norms in latent units; NaN where nothing was measured.
        threshold: Drawn as a dashed line, for scores averaged over these steps.
        theme: Colours of the page it will stand on; the ground itself is transparent.
        width: Inches at 100 pixels; letters keep their size.
    """
    array = np.asarray(traces, dtype=float)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"`traces` must be [seed step] and not empty, got shape {array.shape}.")
    colors = THEMES[theme]
    figure, axes = new_figure(theme, width, 0.5 * width)
    steps = np.arange(1, array.shape[1] + 1)
    with np.errstate(invalid="ignore"):
        counts = np.isfinite(array).sum(0)
        mean = np.where(counts > 0, np.nansum(array, 0) / np.maximum(counts, 1), np.nan)
    for index, row in enumerate(array):
        axes.plot(steps, row, color=colors["other"], alpha=0.5, linewidth=1, gid=f"seed-{index}")
    axes.plot(steps, mean, color=colors["flagged"], linewidth=2.2, marker="o", ms=4, gid="mean")
    if threshold is not None:
        axes.axhline(threshold, color=colors["ink"], linestyle="--", linewidth=1, gid="threshold")
    axes.set(xlabel="denoising step, noisiest first", ylabel="score (L2, latent units)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    return to_svg(figure)


def score_distribution_figure(
    scores: Sequence[float] | np.ndarray,
    flagged: Sequence[bool] | np.ndarray,
    control_scores: Sequence[float] | np.ndarray,
    threshold: float | None,
    *,
    theme: Theme = "light",
    width: float = 6.4,
) -> str:
    """Return an SVG with a dot per audited prompt and per control, and the threshold between.

    Args:
        scores: Of the audited prompts, L2 in latent units.
        flagged: Whether each is above the threshold.
        control_scores: Of the control prompts, same unit.
        threshold: Same unit, drawn as a vertical line; None when there is none.
        theme: Colours of the page it will stand on; the ground itself is transparent.
        width: Inches at 100 pixels; letters keep their size.
    """
    audited, controls = (np.asarray(v, dtype=float) for v in (scores, control_scores))
    hits = np.asarray(flagged, dtype=bool)
    if audited.shape != hits.shape:
        raise ValueError(f"{len(audited)} `scores` but {len(hits)} `flagged`.")
    figure, axes = new_figure(theme, width, max(2.6, 0.46 * width))
    every = np.concatenate([audited, controls, [] if threshold is None else [threshold]])
    every = every[np.isfinite(every)]
    if not every.size:
        raise ValueError("There is no finite score to draw.")
    low, high = every.min(), every.max()
    if low > 0 and high / low > 30:
        axes.set_xscale("log")
    margin = 0.04 * (high - low) or 1.0
    axes.set_xlim(max(low - margin, low / 1.2) if low > 0 else low - margin, high + margin)
    _draw_rows(axes, audited, hits, controls, THEMES[theme])
    if threshold is not None:
        ink, right = THEMES[theme]["ink"], threshold > (low + high) / 2
        axes.axvline(threshold, color=ink, linestyle="--", linewidth=1.2, gid="threshold")
        axes.annotate(
            f"threshold {threshold:.4g}", (threshold, 2.02), xytext=(-6 if right else 6, 0),
            textcoords="offset points", ha="right" if right else "left", va="bottom", color=ink,
        )  # fmt: skip
    axes.set(xlabel="score (L2 norm, latent units)", ylim=(-0.04, 2.2))
    axes.set_yticks([0.45, 1.45], ["controls", "audited"])
    axes.tick_params(axis="y", length=0)
    return to_svg(figure)


def _draw_rows(
    axes: "Axes", audited: np.ndarray, hits: np.ndarray, controls: np.ndarray, colors: dict
) -> None:
    """Draw the dots, audited prompts above the controls, stacked where scores coincide."""
    low, high = axes.get_xlim()
    log = axes.get_xscale() == "log"
    both = np.concatenate([audited, controls])
    heights = np.concatenate([
        1 + _stack(audited, low, high, log), _stack(controls, low, high, log)
    ])  # fmt: skip
    kind = np.concatenate([np.where(hits, 2, 1), np.zeros(len(controls), int)])
    area = float(np.clip(6000 / max(len(both), 1), 5, 26))
    for code, gid, role, marker in (
        (0, "controls", "control", "o"), (1, "others", "other", "o"), (2, "flagged", "flagged", "D")
    ):  # fmt: skip
        chosen = (kind == code) & np.isfinite(both)
        dots = axes.scatter(
            both[chosen], heights[chosen], s=area, c=colors[role], marker=marker, linewidths=0,
            alpha=0.85,
        )  # fmt: skip
        dots.set_gid(gid)
        dots.set_rasterized(len(both) > 3000)  # a dot is some 80 bytes of SVG


def _stack(values: np.ndarray, low: float, high: float, log: bool) -> np.ndarray:
    """Return heights in 0..0.9: values that fall into one of 90 columns stand on each other."""
    if log:
        values, low, high = np.log(np.maximum(values, low)), math.log(low), math.log(high)
    columns = np.nan_to_num((values - low) / (high - low) * 90, posinf=90, neginf=0).astype(int)
    ranks, seen = np.zeros(len(values)), {}
    # By chance, always the same: in the order of the values each column would lean to the right.
    for index in np.random.default_rng(0).permutation(len(values)):
        column = columns[index]
        ranks[index] = seen[column] = seen.get(column, -1) + 1
    return ranks * min(0.06, 0.9 / max(ranks.max(initial=0), 1))


def new_figure(theme: Theme, width: float, height: float) -> "tuple[Figure, Axes]":
    """Return a figure without global state, in the colours of `theme`."""
    figures = require("matplotlib.figure", purpose="Drawing plots", extra="reports")
    colors = THEMES[theme]
    figure = figures.Figure(figsize=(width, height), dpi=100, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=colors["muted"], labelcolor=colors["ink"])
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("bottom", "left"))
        spine.set_color(colors["line"])
    axes.xaxis.label.set_color(colors["ink"])
    axes.yaxis.label.set_color(colors["ink"])
    return figure, axes


def to_svg(figure: "Figure") -> str:
    """Return the figure as SVG, the same bytes for the same input, with real text."""
    import matplotlib

    stream = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "unmemorize"}):
        figure.savefig(stream, format="svg", metadata=_NO_METADATA)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r"font-family: 'DejaVu Sans'[^;]*", f"font-family: {_FONTS}", svg)
