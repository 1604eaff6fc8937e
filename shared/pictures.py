"""Scores made visible: coloured prompts, score plots, and maps over images, for light and dark.

One hue carries every quantity: words and maps grow stronger in it, flagged prompts are drawn in it.
Text keeps one colour whatever its background, so that it can always be read (WCAG contrast 4.5).
"""

import html
import math
import unicodedata
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .typeset import draw_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

Theme = Literal["light", "dark"]
LEVELS = 20
"""Steps of the word colours; level 0 is the page itself."""
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
_HEAT = np.array([[0, 0, 0], [60, 20, 70], [184, 69, 12], [250, 160, 50], [255, 248, 220]], float)
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]


def visible(text: str) -> str:
    """Return `text` with everything that does not print shown as a sign.

    Control characters become their Unicode pictures, direction overrides, unpaired surrogates and
    noncharacters ``<U+202E>``; letters of any script, joiners of emoji and Persian stay.
    """

    def sign(char: str) -> str:
        code = ord(char)
        if code < 0x20 or code == 0x7F:
            return chr(0x2421 if code == 0x7F else 0x2400 + code)
        spoofs = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or code in (0x2028, 0x2029)
        absent = 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE
        hidden = unicodedata.category(char) in ("Cc", "Cs") or spoofs or absent
        return f"<U+{code:04X}>" if hidden else char

    return "".join(map(sign, text))


def word_levels(significance: Sequence[float]) -> list[int]:
    """Return a colour level from 0 to `LEVELS` per word, relative to the strongest word."""
    values = np.nan_to_num(np.asarray(significance, dtype=float), nan=0, posinf=0, neginf=0)
    values = values.clip(min=0)
    top = values.max(initial=0)
    return [round(LEVELS * float(value / top)) if top > 0 else 0 for value in values]


def level_color(level: int, theme: Theme = "light") -> str:
    """Return the background of a word at `level`, #rrggbb: the page at 0, strongest at `LEVELS`."""
    ends = (THEMES[theme][role] for role in ("page", "strong"))
    page, strong = ([int(end[i : i + 2], 16) for i in (1, 3, 5)] for end in ends)
    part = level / LEVELS
    mixed = (round(a + (b - a) * part) for a, b in zip(page, strong, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def heatmap_css() -> str:
    """Return the style sheet of `prompt_heatmap_html`, which follows the reader's light or dark."""
    head = (
        ".heatmap{line-height:1.9;overflow-wrap:anywhere}"
        ".heatmap span{padding:.12em .25em;border-radius:.25em;"
        "-webkit-print-color-adjust:exact;print-color-adjust:exact}"
    )

    def rules(theme: Theme) -> str:
        ink = THEMES[theme]["ink"]
        return "".join(
            f".heatmap .w{level}{{background:{level_color(level, theme)};color:{ink}}}"
            for level in range(1, LEVELS + 1)
        )

    dark = f"@media screen and (prefers-color-scheme:dark){{{rules('dark')}}}"
    return head + rules("light") + dark


def prompt_heatmap_html(
    words: Sequence[str], significance: Sequence[float], *, style: bool = True
) -> str:
    """Return the prompt as escaped HTML, each word on its colour with its number as tooltip.

    Args:
        words: As typed, in order; may hold markup and control characters.
        significance: One number per word, >= 0; colours are relative to the largest.
        style: Put `heatmap_css` in front, so that the snippet stands on its own.
    """
    _check_pairs(words, significance)
    spans = (
        f'<span class="w{level}" title="{html.escape(visible(word))}: {value:.3g}">'
        f"{html.escape(visible(word))}</span>"
        for word, value, level in zip(words, significance, word_levels(significance), strict=True)
    )
    sheet = f"<style>{heatmap_css()}</style>" if style else ""
    return f'{sheet}<bdi class="heatmap" dir="auto">{" ".join(spans)}</bdi>'


def prompt_heatmap_png(
    words: Sequence[str],
    significance: Sequence[float],
    *,
    width: int = 768,
    size: int = 22,
    theme: Theme = "light",
) -> "Image":
    """Return the prompt as an RGB picture, wrapped to `width` pixels, each word on its colour.

    Scripts that no installed font can draw appear as their code points, never as empty boxes.

    Args:
        words: As typed, in order.
        significance: One number per word, >= 0; colours are relative to the largest.
        width: Pixels; the height follows from the text.
        size: Of the letters, pixels.
        theme: Light or dark page.
    """
    _check_pairs(words, significance)
    colors = [level_color(level, theme) for level in word_levels(significance)]
    page, ink = THEMES[theme]["page"], THEMES[theme]["ink"]
    shown = [visible(word) for word in words]
    return draw_words(shown, colors, page=page, ink=ink, width=width, size=size)


def overlay_map(image: "Image", values: Any, *, strength: float = 0.85) -> "Image":
    """Return `image` in grey with `values` laid over it, dark where low and glowing where high.

    Args:
        image: Any size and mode.
        values: [height width] at any resolution, e.g. a score-difference map; scaled to its own
            1st and 99th percentile, so only the places within one map can be compared.
        strength: Opacity of the highest value, 0 to 1; 0 gives the grey image.
    """
    from PIL import Image

    array = np.nan_to_num(np.asarray(values, dtype=np.float32))
    if array.ndim != 2:
        raise ValueError(f"`values` must be [height width], got shape {tuple(array.shape)}.")
    low, high = np.percentile(array, [1, 99])
    unit = ((array - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(array)
    resized = Image.fromarray(unit).resize(image.size, Image.Resampling.BICUBIC)
    unit = np.asarray(resized).clip(0, 1)[..., None]
    stops = np.linspace(0, 1, len(_HEAT))
    heat = np.concatenate([np.interp(unit, stops, _HEAT[:, c]) for c in range(3)], axis=-1)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] * 0.75
    alpha = strength * unit**0.7
    return Image.fromarray((grey * (1 - alpha) + heat * alpha).round().astype(np.uint8))


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
    figure, axes = _figure(theme, width, 0.5 * width)
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
    return _svg(figure)


def score_distribution_figure(
    scores: Sequence[float],
    flagged: Sequence[bool],
    control_scores: Sequence[float],
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
    figure, axes = _figure(theme, width, max(2.6, 0.46 * width))
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
    return _svg(figure)


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
    columns = np.nan_to_num((values - low) / (high - low) * 90).astype(int)
    ranks, seen = np.zeros(len(values)), {}
    # By chance, always the same: in the order of the values each column would lean to the right.
    for index in np.random.default_rng(0).permutation(len(values)):
        column = columns[index]
        ranks[index] = seen[column] = seen.get(column, -1) + 1
    return ranks * min(0.06, 0.9 / max(ranks.max(initial=0), 1))


def _figure(theme: Theme, width: float, height: float) -> "tuple[Figure, Axes]":
    """Return a figure without global state, in the colours of `theme`."""
    from matplotlib.figure import Figure

    colors = THEMES[theme]
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
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


def _svg(figure: "Figure") -> str:
    """Return the figure as SVG, the same bytes for the same input, with real text."""
    import matplotlib

    stream = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "unmemorize"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue().replace("'DejaVu Sans'", ", ".join(_FONTS[:3]))


def _check_pairs(words: Sequence[str], significance: Sequence[float]) -> None:
    if len(words) != len(significance):
        raise ValueError(f"{len(words)} words but {len(significance)} significances.")
