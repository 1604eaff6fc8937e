"""Scores of a sampling run drawn as a picture, to be read at the width of a node."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..sampling.run_wording import NO_CALIBRATION, headline, image_line
from ..sampling.watched_runs import RunVerdict, WatchedRun
from .plots import THEMES, Theme
from .typeset import draw_words, write

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

Number = int | float
WIDTH, PLOT_HEIGHT = 640, 330
LEFT, RIGHT, TOP, BOTTOM = 74, 46, 96, 58
TITLE, LETTERS, SMALL = 30, 21, 19
LINE = 30
KEY_THRESHOLD, KEY_CONTROLS = 262, 410  # where the key's signs begin
LISTED = 6
"""At most so many images are listed, highest score first."""
_FINE = 3  # shapes are drawn so many times larger and reduced: Pillow's lines have hard edges


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
    order = sorted(range(len(verdict.images)), key=lambda i: -verdict.images[i].score)
    before = [image.noise_before for image in run.guarded if image.noise_before is not None]
    notes = _notes(verdict, guarded=bool(before))
    rows = min(len(order), LISTED) + (len(order) > LISTED) + len(notes)
    height = TOP + PLOT_HEIGHT + BOTTOM + LINE * rows + 24
    plot = _Plot(run.traces.numpy(), verdict, colors, before)

    image = Image.new("RGB", (WIDTH * _FINE, height * _FINE), colors["page"])
    plot.draw_shapes(ImageDraw.Draw(image))
    image = image.resize((WIDTH, height), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    loud = colors["flagged"] if verdict.hits else colors["ink"]
    write(draw, (LETTERS, 46), headline(verdict), size=TITLE, fill=loud)
    plot.write_labels(draw)
    base = TOP + PLOT_HEIGHT + BOTTOM + LINE
    for index in order[:LISTED]:
        fill = colors["flagged"] if verdict.images[index].memorized else colors["ink"]
        write(draw, (LETTERS, base), image_line(verdict, index), size=LETTERS, fill=fill)
        base += LINE
    if len(order) > LISTED:
        more = f"and {len(order) - LISTED} more with lower scores"
        write(draw, (LETTERS, base), more, size=LETTERS, fill=colors["muted"])
        base += LINE
    for note in notes:
        write(draw, (LETTERS, base), note, size=SMALL, fill=colors["muted"])
        base += LINE
    return image


def draw_note(text: str, *, theme: Theme = "dark") -> "Image":
    """Return a picture that says why there are no scores, RGB, `WIDTH` pixels wide."""
    colors, words = THEMES[theme], text.split()
    page = [colors["page"]] * len(words)
    return draw_words(
        words, page, page=colors["page"], ink=colors["ink"], width=WIDTH, size=LETTERS
    )


def _notes(verdict: RunVerdict, *, guarded: bool) -> list[str]:
    """Return what stands below the images, short enough for one line each."""
    notes = ["Rings: with the noise that the guard replaced."] if guarded else []
    if verdict.threshold is None:
        notes.append(NO_CALIBRATION)
    elif verdict.caveats:
        notes.append("The calibration does not fit; see the report text.")
    return notes


class _Plot:
    """The part of the picture with axes."""

    def __init__(
        self,
        traces: np.ndarray,
        verdict: RunVerdict,
        colors: dict[str, str],
        before: Sequence[float],
    ):
        self.traces, self.verdict, self.colors, self.before = traces, verdict, colors, before
        marks = (verdict.threshold or 0.0, *(verdict.controls or ()), *before)
        highest = max(float(traces.max()), *marks) or 1.0
        self.unit = _nice(highest / 4)
        self.top = self.unit * math.ceil(highest * 1.02 / self.unit)
        self.levels = traces.shape[1]

    def x(self, level: Number) -> float:
        """Return pixels from the left of a noise level, counted from 1."""
        room = WIDTH - LEFT - RIGHT
        return LEFT + room * (level - 0.5) / self.levels

    def y(self, score: Number) -> float:
        """Return pixels from the top of a score."""
        return TOP + PLOT_HEIGHT * (1 - score / self.top)

    def draw_shapes(self, draw: "ImageDraw") -> None:
        """Draw everything but letters, `_FINE` times larger."""
        colors, verdict = self.colors, self.verdict

        def line(points: Sequence[tuple], color: str, width: int = 8) -> None:
            draw.line(
                [(x * _FINE, y * _FINE) for x, y in points], fill=color, width=width, joint="curve"
            )

        for tick in self._ticks():
            line([(LEFT, self.y(tick)), (WIDTH - RIGHT, self.y(tick))], colors["line"], 3)
        end = self.x(verdict.steps + 0.5)
        if verdict.controls is not None:
            low, high = verdict.controls
            key = [KEY_CONTROLS, TOP - 35, KEY_CONTROLS + 24, TOP - 19]
            for box in ([LEFT, self.y(high), end, self.y(low)], key):
                draw.rectangle([side * _FINE for side in box], fill=_blend(colors, "control", 0.45))
        for index, trace in enumerate(self.traces):
            color = colors["flagged" if verdict.images[index].memorized else "other"]
            points = [(self.x(i + 1), self.y(v)) for i, v in enumerate(trace.tolist())]
            line(points, color)
            for x, y in points[: verdict.steps]:
                dot = [x - 6, y - 6, x + 6, y + 6]
                draw.ellipse([side * _FINE for side in dot], fill=color)
        for score in self.before:
            x, y = self.x(1), self.y(score)
            ring = [side * _FINE for side in (x - 8, y - 8, x + 8, y + 8)]
            draw.ellipse(ring, outline=colors["ink"], width=8)
        if verdict.threshold is not None:
            y = self.y(verdict.threshold)
            for left, right, height in (
                (LEFT, end, y), (KEY_THRESHOLD, KEY_THRESHOLD + 24, TOP - 27)
            ):  # fmt: skip
                line([(left, height), (right, height)], colors["ink"])

    def write_labels(self, draw: "ImageDraw") -> None:
        """Write the numbers of the axes and what the marks mean."""
        colors, verdict, base = self.colors, self.verdict, TOP + PLOT_HEIGHT

        def put(
            x: Number, y: Number, text: str, role: str = "muted", anchor: str = "middle"
        ) -> None:
            write(draw, (x, y), text, size=SMALL, fill=colors[role], anchor=anchor)

        put(LETTERS, TOP - 20, "score, L2 norm", anchor="left")
        for tick in self._ticks():
            put(LEFT - 10, self.y(tick) + 7, f"{tick:.4g}", anchor="right")
        for level in _marks(self.levels):
            put(self.x(level), base + 26, str(level))
        put(WIDTH - RIGHT, base + 52, "sampling steps, noisiest first", anchor="right")
        if verdict.threshold is not None:
            put(KEY_THRESHOLD + 32, TOP - 20, "threshold", anchor="left")
            put(KEY_CONTROLS + 32, TOP - 20, "90 % of controls", anchor="left")
        if 1 < len(self.traces) <= LISTED:
            self._number_lines(put)

    def _number_lines(self, put) -> None:
        """Write each image's number at the end of its line, where it does not hide another."""
        taken: list[float] = []
        for index in np.argsort(-self.traces[:, -1]):
            y = self.y(float(self.traces[index, -1])) + 7
            if all(abs(y - other) > SMALL for other in taken):
                put(self.x(self.levels) + 12, y, str(index + 1), "ink", "left")
                taken.append(y)

    def _ticks(self) -> list[float]:
        return [float(self.unit * i) for i in range(round(self.top / self.unit) + 1)]


def _nice(value: Number) -> Number:
    """Return the next of 1, 2, 5 times a power of ten; `value` is above 0."""
    power = 10 ** math.floor(math.log10(value))
    return next((power * step for step in (1, 2, 5) if power * step >= value), 10 * power)


def _marks(levels: int) -> list[int]:
    """Return at most eight steps to be numbered, the first among them."""
    every = max(1, math.ceil(_nice(levels / 8)))
    return [1, *(level for level in range(every, levels + 1, every) if level > max(1, every / 2))]


def _blend(colors: dict[str, str], role: str, part: float) -> str:
    """Return a colour of the theme laid over its page."""
    pair = zip(*([int(c[i : i + 2], 16) for i in (1, 3, 5)]
                 for c in (colors["page"], colors[role])), strict=True)  # fmt: skip
    return "#" + "".join(f"{round(page + (ink - page) * part):02x}" for page, ink in pair)
