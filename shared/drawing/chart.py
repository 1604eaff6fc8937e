"""A chart with axes, drawn by Pillow for nodes and for pages."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .theme import THEMES, Theme, mixed
from .typeset import Anchor, Number, text_width, write

if TYPE_CHECKING:
    from PIL.Image import Image

Shape = Literal["disc", "ring", "diamond"]
Point = tuple[Number, Number]
"""Values on the two axes."""
FINE = 3
"""Shapes are drawn so many times larger and then reduced: Pillow's lines have hard edges."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a chart."""

    label: str
    low: Number
    """Value at the left or at the bottom."""
    high: Number
    ticks: Sequence[tuple[Number, str]]
    """Values that are marked, rising, and what is written there."""
    log: bool = False

    def part(self, value: Number) -> Number:
        """Return where a value lies, 0 at the low end of the axis, 1 at the high end."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return (value - low) / (high - low)


def round_ticks(
    low: Number, high: Number, most: int, *, whole: bool = False, log: bool = False
) -> list[tuple[Number, str]]:
    """Return round numbers between two values as the ticks of an axis.

    Args:
        low: Least value; above 0 where `log`.
        high: Greatest value.
        most: About how many there may be; does not count where `log`.
        whole: Whole numbers only.
        log: 1, 2 and 5 times each power of ten, in place of equal distances.
    """
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [step * 10.0**power for power in powers for step in (1, 2, 5)]
        return [(value, f"{value:.4g}") for value in values if low <= value <= high]
    step = round_step((high - low) / most)
    step = max(step, 1) if whole else step
    values = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(value, f"{value:.4g}") for value in values]


def round_step(least: Number) -> Number:
    """Return the next of 1, 2, 5 times a power of ten; for 0, 1."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next((power * step for step in (1, 2, 5) if power * step >= least), 10 * power)


class Chart:
    """A chart while it is drawn.

    Lengths besides `width` and `height` are multiples of the size of the letters. Colours are roles
    of the theme.
    """

    def __init__(self, x: Axis, y: Axis, *, width: int, height: int, size: int, theme: Theme):
        """Draw the axes; all sizes are in pixels, `size` is that of the letters."""
        from PIL import Image, ImageDraw

        self.x, self.y, self.size, self.theme = x, y, size, theme
        self.left = 1.3 * size + max(text_width(label, size) for _, label in y.ticks)
        self.right, self.top, self.bottom = width - 2.4 * size, 2.4 * size, height - 3.1 * size
        self._image = Image.new("RGB", (width * FINE, height * FINE), THEMES[theme]["page"])
        self._draw = ImageDraw.Draw(self._image)
        self._letters: list[tuple[Point, str, str, Anchor]] = []
        for value, label in y.ticks:
            self.line([(x.low, value), (x.high, value)], "line", width=0.05)
            level = self.place(x.low, value)[1] + 0.36 * size
            self._letters.append(((self.left - 0.5 * size, level), label, "muted", "right"))
        self._mark_x()
        self._letters.append(((size, 1.4 * size), y.label, "muted", "left"))
        below = (self.right, self.bottom + 2.7 * size)
        self._letters.append((below, x.label, "muted", "right"))

    def _mark_x(self) -> None:
        """Draw the ticks of the x axis; labels that would touch the one before are left out."""
        free = 0.0
        for value, label in self.x.ticks:
            place, half = self.place(value, self.y.low)[0], text_width(label, self.size) / 2
            self._stroke([(place, self.bottom), (place, self.bottom + 0.25 * self.size)], "line", 2)
            if place - half >= free:
                below = (place, self.bottom + 1.4 * self.size)
                self._letters.append((below, label, "muted", "middle"))
                free = place + half + 0.4 * self.size

    def place(self, x: Number, y: Number) -> Point:
        """Return pixels from the left and from the top."""
        return (
            self.left + (self.right - self.left) * self.x.part(x),
            self.bottom - (self.bottom - self.top) * self.y.part(y),
        )

    def line(
        self, points: Iterable[Point], role: str, *, width: Number = 0.14, opacity: Number = 1
    ) -> None:
        """Draw a line through points; it is broken where one of them is not finite."""
        run: list[Point] = []
        for x, y in [*points, (math.nan, math.nan)]:
            if math.isfinite(x) and math.isfinite(y):
                run.append(self.place(x, y))
                continue
            if len(run) > 1:
                self._stroke(run, role, width * self.size, opacity)
            run = []

    def dots(
        self,
        points: Iterable[Point],
        role: str,
        *,
        radius: Number = 0.32,
        shape: Shape = "disc",
        opacity: Number = 1,
    ) -> None:
        """Draw a mark at every point that is finite."""
        color, r = mixed(self.theme, role, opacity), radius * self.size
        for point in points:
            if not all(map(math.isfinite, point)):
                continue
            x, y = self.place(*point)
            if shape == "diamond":
                corners = [(x - r, y), (x, y - r), (x + r, y), (x, y + r)]
                self._draw.polygon(_fine(corners), fill=color)
                continue
            box = _fine([(x - r, y - r), (x + r, y + r)])
            if shape == "ring":
                self._draw.ellipse(box, outline=color, width=round(0.14 * self.size * FINE))
            else:
                self._draw.ellipse(box, fill=color)

    def band(self, low: Number, high: Number, role: str, *, until: Number, opacity: Number) -> None:
        """Fill what lies between two values of y, up to a value of x."""
        corners = [self.place(self.x.low, high), self.place(until, low)]
        self._draw.rectangle(_fine(corners), fill=mixed(self.theme, role, opacity))

    def upright(self, value: Number, label: str) -> None:
        """Draw a dashed line at a value of x, its label at the top on the side with more room."""
        x, size = self.place(value, self.y.low)[0], self.size
        for start in range(round(self.top), round(self.bottom), round(0.6 * size)):
            end = min(start + 0.36 * size, self.bottom)
            self._stroke([(x, start), (x, end)], "ink", 0.1 * size)
        on_left = self.x.part(value) > 0.5
        beside = (x - 0.5 * size if on_left else x + 0.5 * size, self.top + 0.9 * size)
        self._letters.append((beside, label, "ink", "right" if on_left else "left"))

    def error_bar(self, x: Number, low: Number, high: Number, role: str) -> None:
        """Draw an interval of y with caps at its ends."""
        (across, top), (_, bottom), cap = self.place(x, high), self.place(x, low), 0.25 * self.size
        self._stroke([(across, top), (across, bottom)], role, 0.08 * self.size)
        for y in (top, bottom):
            self._stroke([(across - cap, y), (across + cap, y)], role, 0.08 * self.size)

    def key(self, signs: Sequence[tuple[Literal["line", "band"], str, Number, str]]) -> None:
        """Say above the plot what lines and bands are: sign, role, opacity, words; from the left.

        The last one ends at the right edge.
        """
        x, size = self.right, self.size
        for sign, role, opacity, words in reversed(signs):
            self._letters.append(((x, 1.4 * size), words, "muted", "right"))
            x -= text_width(words, size) + 1.7 * size
            thick = 0.14 if sign == "line" else 0.85
            ends = [(x, 1.03 * size), (x + 1.26 * size, 1.03 * size)]
            self._stroke(ends, role, thick * size, opacity)
            x -= size

    def label(self, x: Number, y: Number, words: str) -> None:
        """Write words to the right of a point."""
        across, down = self.place(x, y)
        beside = (across + 0.6 * self.size, down + 0.36 * self.size)
        self._letters.append((beside, words, "ink", "left"))

    def image(self) -> "Image":
        """Return the finished chart, RGB."""
        from PIL import ImageDraw

        image = self._image.reduce(FINE)
        draw = ImageDraw.Draw(image)
        for place, words, role, anchor in self._letters:
            color = THEMES[self.theme][role]
            write(draw, place, words, size=self.size, fill=color, anchor=anchor)
        return image

    def _stroke(self, places: list[Point], role: str, width: Number, opacity: Number = 1) -> None:
        color, thick = mixed(self.theme, role, opacity), max(1, round(width * FINE))
        self._draw.line(_fine(places), fill=color, width=thick, joint="curve")


def _fine(places: Iterable[Point]) -> list[Point]:
    return [(x * FINE, y * FINE) for x, y in places]
