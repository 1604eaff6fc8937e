"""Scores of a sampling run drawn as an image, to be read at the width of a node."""

from typing import TYPE_CHECKING

import numpy as np

from ..sampling.watched_runs import NO_CALIBRATION, RunVerdict, WatchedRun, headline, image_line
from .chart import Chart
from .score_charts import scores_axis, steps_axis
from .theme import THEMES, Theme
from .typeset import draw_words, write

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, PLOT_HEIGHT = 640, 430
TITLE, LETTERS, SMALL = 30, 21, 19
LINE, TOP = 30, 58
LISTED = 6
"""At most so many images are listed, highest score first."""


def draw_step_chart(run: WatchedRun, verdict: RunVerdict, *, theme: Theme = "dark") -> "Image":
    """Return the score per noise level, one line an image, with what the controls reach.

    Args:
        run: With at least one measured level.
        verdict: Of the same run.
        theme: Colours.

    Returns:
        RGB, `WIDTH` pixels wide; the height follows from the number of images.
    """
    from PIL import Image, ImageDraw

    colors = THEMES[theme]
    rows = _rows(run, verdict)
    height = TOP + PLOT_HEIGHT + LINE * len(rows) + 24
    image = Image.new("RGB", (WIDTH, height), colors["page"])
    image.paste(_plot(run, verdict, theme), (0, TOP))
    draw = ImageDraw.Draw(image)
    loud = colors["flagged"] if verdict.hits else colors["ink"]
    write(draw, (LETTERS, 46), headline(verdict), size=TITLE, fill=loud)
    for number, (text, size, role) in enumerate(rows, 1):
        base = TOP + PLOT_HEIGHT + LINE * number
        write(draw, (LETTERS, base), text, size=size, fill=colors[role])
    return image


def draw_note(text: str, *, theme: Theme = "dark") -> "Image":
    """Return an image that says why there are no scores, RGB, `WIDTH` pixels wide."""
    words = text.split()
    return draw_words(
        words, [THEMES[theme]["page"]] * len(words), theme=theme, width=WIDTH, size=LETTERS
    )


def _rows(run: WatchedRun, verdict: RunVerdict) -> list[tuple[str, int, str]]:
    """Return the lines below the plot, each with its letters' size and its colour's role."""
    order = sorted(range(len(verdict.images)), key=lambda i: -verdict.images[i].score)
    rows = [
        (image_line(verdict, i), LETTERS, "flagged" if verdict.images[i].hit else "ink")
        for i in order[:LISTED]
    ]
    if len(order) > LISTED:
        rows.append((f"and {len(order) - LISTED} more with lower scores", LETTERS, "muted"))
    if verdict.measure == "residual":
        rows.append(("Dots: the residual, which decides. Lines: the magnitude.", SMALL, "muted"))
    if _replaced(run):
        rows.append(("Rings: with the noise that the guard replaced.", SMALL, "muted"))
    if verdict.caveats:
        rows.append(("The calibration does not fit; see the report text.", SMALL, "muted"))
    elif verdict.threshold is None:
        rows.append((NO_CALIBRATION, SMALL, "muted"))
    return rows


def _replaced(run: WatchedRun) -> list[float]:
    """Return the scores at initial noise that a guard then replaced."""
    return [image.noise_before for image in run.guarded if image.noise_before is not None]


def _plot(run: WatchedRun, verdict: RunVerdict, theme: Theme) -> "Image":
    """Return the part of the image with axes."""
    traces, rings = run.traces.numpy(), _replaced(run)
    scored = [image.score for image in verdict.images]
    highest = max(traces.max(), *scored, verdict.threshold or 0, *(verdict.controls or ()), *rings)
    steps, scores = steps_axis(traces.shape[1]), scores_axis(float(highest))
    chart = Chart(steps, scores, width=WIDTH, height=PLOT_HEIGHT, size=SMALL, theme=theme)
    until = verdict.steps + 0.5
    if verdict.controls is not None:
        chart.band(*verdict.controls, "control", until=until, opacity=0.45)
    for image, trace in zip(verdict.images, traces.tolist(), strict=True):
        role, points = "flagged" if image.hit else "other", list(enumerate(trace, 1))
        chart.line(points, role)
        residual = verdict.measure == "residual"
        chart.dots([(1, image.score)] if residual else points[: verdict.steps], role)
    chart.dots([(1, score) for score in rings], "ink", radius=0.42, shape="ring")
    if verdict.threshold is not None:
        chart.line([(steps.low, verdict.threshold), (until, verdict.threshold)], "ink")
        chart.key([("line", "ink", 1, "threshold"), ("band", "control", 0.45, "90 % of controls")])
    if 1 < len(traces) <= LISTED:
        _number_lines(chart, traces)
    return chart.image()


def _number_lines(chart: Chart, traces: np.ndarray) -> None:
    """Write each image's number at the end of its line, where it does not hide another."""
    taken: list[float] = []
    for index in np.argsort(-traces[:, -1]):
        last = (traces.shape[1], float(traces[index, -1]))
        down = chart.place(*last)[1]
        if all(abs(down - other) > SMALL for other in taken):
            chart.label(*last, str(index + 1))
            taken.append(down)
