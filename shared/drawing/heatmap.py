"""Prompts whose words are coloured by how much they matter, and maps laid over images.

Words keep one colour of letters whatever their background, so that they can always be read.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..wording import visible
from .theme import THEMES, Theme, mixed
from .typeset import draw_words

if TYPE_CHECKING:
    from PIL.Image import Image

LEVELS = 20
"""Steps of the word colours; level 0 is the page itself."""
_HEAT = np.array([[0, 0, 0], [60, 20, 70], [184, 69, 12], [250, 160, 50], [255, 248, 220]], float)


def word_levels(significance: Sequence[float | None]) -> list[int]:
    """Return a colour level from 0 to `LEVELS` per word, relative to the strongest word.

    Words below 0 and words that were not measured (None, NaN) have level 0.
    """
    values = np.nan_to_num(np.asarray(significance, dtype=float), nan=0, posinf=0, neginf=0)
    values = values.clip(min=0)
    top = values.max(initial=0)
    return [round(LEVELS * float(value / top)) if top > 0 else 0 for value in values]


def level_color(level: int, theme: Theme = "light") -> str:
    """Return the background of a word at `level`, #rrggbb: the page at 0, strongest at `LEVELS`."""
    return mixed(theme, "strong", level / LEVELS)


def heatmap_css() -> str:
    """Return the style sheet of `prompt_heatmap_html`, which follows the reader's light or dark."""
    head = (
        ".heatmap{line-height:1.9;overflow-wrap:anywhere}"
        ".heatmap :is(span,button){padding:.12em .25em;border-radius:.25em;"
        "-webkit-print-color-adjust:exact;print-color-adjust:exact}"
        ".heatmap button{font:inherit;color:inherit;background:none;border:0;margin:0;"
        "text-align:start;cursor:pointer}"
        ".heatmap button:hover{text-decoration:underline}"
        ".heatmap button[aria-pressed=true]{text-decoration:line-through}"
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
    words: Sequence[str],
    significance: Sequence[float | None],
    *,
    style: bool = True,
    says: Mapping[int, str] | None = None,
) -> str:
    """Return the prompt as escaped HTML, each word on its colour with its number as tooltip.

    Args:
        words: As typed, in order; may hold markup and control characters.
        significance: One number per word, None or NaN for words not measured; colours are relative
            to the largest, and none below 0.
        style: Put `heatmap_css` in front, so that the snippet stands on its own.
        says: What a script can say when a word is struck, by the word's index: it becomes the
            attribute ``data-says``, beside ``data-word``, the index.
    """
    _check_pairs(words, significance)
    spans = []
    for index, level in enumerate(word_levels(significance)):
        word, value = html.escape(visible(words[index])), significance[index]
        known = value is not None and not math.isnan(value)
        said = html.escape(visible((says or {}).get(index, "")))
        data = f' data-word="{index}" data-says="{said}"' if said else ""
        measured = f"{value:.3g}" if known else "not measured"
        spans.append(f'<span class="w{level}" title="{word}: {measured}"{data}>{word}</span>')
    sheet = f"<style>{heatmap_css()}</style>" if style else ""
    return f'{sheet}<bdi class="heatmap" dir="auto">{" ".join(spans)}</bdi>'


def prompt_heatmap_png(
    words: Sequence[str],
    significance: Sequence[float | None],
    *,
    width: int = 768,
    size: int = 22,
    theme: Theme = "light",
) -> "Image":
    """Return the prompt as an RGB image, wrapped to `width` pixels, each word on its colour.

    Scripts that no installed font can draw appear as their code points, never as empty boxes.

    Args:
        words: As typed, in order.
        significance: As for `prompt_heatmap_html`.
        width: Pixels; the height follows from the text.
        size: Of the letters, pixels.
        theme: Light or dark page.
    """
    _check_pairs(words, significance)
    colors = [level_color(level, theme) for level in word_levels(significance)]
    return draw_words([*map(visible, words)], colors, theme=theme, width=width, size=size)


def overlay_map(image: "Image", values: Any, *, strength: float = 0.85) -> "Image":
    """Return `image` in grey with `values` laid over it, dark where low and glowing where high.

    Args:
        image: Any size and mode.
        values: [height width] at any resolution, e.g. a score-difference map; scaled to its own
            1st and 99th percentile, so only the places within one map can be compared.
        strength: Opacity of the highest value, 0 to 1; 0 gives the grey image.
    """
    from PIL import Image

    resized = Image.fromarray(unit_map(values)).resize(image.size, Image.Resampling.BICUBIC)
    unit = np.asarray(resized).clip(0, 1)[..., None]
    stops = np.linspace(0, 1, len(_HEAT))
    heat = np.concatenate([np.interp(unit, stops, _HEAT[:, c]) for c in range(3)], axis=-1)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] * 0.75
    alpha = strength * unit**0.7
    return Image.fromarray((grey * (1 - alpha) + heat * alpha).round().astype(np.uint8))


def unit_map(values: Any) -> np.ndarray:
    """Return a map [height width] scaled to 0 .. 1 between its own 1st and 99th percentile."""
    array = np.nan_to_num(np.asarray(values, dtype=np.float32))
    if array.ndim != 2:
        raise ValueError(f"`values` must be [height width], got shape {tuple(array.shape)}.")
    low, high = np.percentile(array, [1, 99])
    return ((array - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(array)


def _check_pairs(words: Sequence[str], significance: Sequence[float | None]) -> None:
    if len(words) != len(significance):
        raise ValueError(f"{len(words)} words but {len(significance)} significances.")
