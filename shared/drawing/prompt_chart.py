"""The verdict on one prompt drawn as an image, to be read at the width of a node."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .score_charts import score_distribution
from .step_chart import TITLE, TOP, WIDTH
from .theme import THEMES, Theme
from .typeset import Number, write

if TYPE_CHECKING:
    from PIL.Image import Image


def draw_prompt_chart(
    headline: str,
    scores: Sequence[Number],
    flags: Sequence[bool],
    controls: Sequence[Number] | np.ndarray,
    threshold: Number | None,
    *,
    theme: Theme = "dark",
) -> "Image":
    """Return a prompt's scores above those of the controls, RGB, `WIDTH` pixels wide.

    Args:
        headline: The verdict in a few words.
        scores: One per part of the prompt.
        flags: Which of them are above the threshold.
        controls: Scores of the controls; none where they do not compare.
        threshold: Same unit; None where there is no verdict.
        theme: Colours.
    """
    from PIL import Image, ImageDraw

    colors = THEMES[theme]
    chart = score_distribution(
        scores, flags, controls, threshold, audited="prompt", theme=theme, width=2 * WIDTH
    )
    chart = chart.resize((WIDTH, chart.height // 2), Image.Resampling.LANCZOS)
    image = Image.new("RGB", (WIDTH, TOP + chart.height), colors["page"])
    image.paste(chart, (0, TOP))
    loud = colors["flagged"] if any(flags) else colors["ink"]
    write(ImageDraw.Draw(image), (21, 40), headline, size=TITLE, fill=loud)
    return image
