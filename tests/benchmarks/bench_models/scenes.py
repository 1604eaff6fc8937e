"""Scenes composed by script: two coloured shapes, how they stand to each other, and a ground."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .truth import SIDE, Slots

SCALE = 4
"""Scenes are drawn so many times as large, and averaged."""
SHAPES = (
    "circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond", "arrow", "moon",
)  # fmt: skip
COLOURS = {
    "red": "#d0342c", "orange": "#f08a24", "yellow": "#f7d94c", "green": "#2f9e44",
    "cyan": "#3bc9db", "blue": "#2b59c3", "purple": "#7b3fb5", "pink": "#f29bc1",
    "white": "#fafafa", "black": "#1c1c22",
}  # fmt: skip
RELATIONS = ("above", "below", "beside", "inside")
GROUNDS = {  # colours, and how coarse the texture is in pixels of the small image
    "sand": ("#e3c892", "#cdae74", 1), "grass": ("#7fb24f", "#5c8f37", 2),
    "water": ("#6fb3dd", "#4a8fc2", 4), "brick": ("#a8563f", "#c97b60", 0),
    "snow": ("#eef3f7", "#d3dee8", 2), "night": ("#20264a", "#343c70", 8),
    "wood": ("#a9774a", "#8d5f38", 0), "stone": ("#9a9a96", "#7f7f7d", 4),
}  # fmt: skip


@dataclass(frozen=True)
class Scenes:
    """Captions such as "the red star above the blue ring on sand"; a pair differs in one word."""

    wording: tuple[str, str, str]
    """The caption as it begins, further on, and whole, of the six slots by number."""

    def pairs(self, rng: np.random.Generator) -> Iterator[tuple[Slots, Slots]]:
        """Yield pairs; captions of two pairs differ in two words at least."""
        choices = (list(COLOURS), SHAPES, RELATIONS, list(COLOURS), SHAPES, list(GROUNDS))
        seen: set[tuple[str | None, ...]] = set()
        while True:
            first = tuple(str(rng.choice(words)) for words in choices)
            place = int(rng.integers(len(choices)))
            word = str(rng.choice([w for w in choices[place] if w != first[place]]))
            second = (*first[:place], word, *first[place + 1 :])
            if any(each[0] == each[3] for each in (first, second)):
                continue
            patterns = _all_but_one(first) | _all_but_one(second)
            if not patterns & seen:
                seen |= patterns
                yield first, second

    def phrases(self, slots: Slots) -> tuple[str, str, str]:
        """Return the wordings with the slots filled in."""
        first, second, whole = (wording.format(*slots) for wording in self.wording)
        return first, second, whole

    def render(self, slots: Slots, seed: int) -> np.ndarray:
        """Draw one scene: places, sizes, turns and texture by chance."""
        colour, shape, relation, other_colour, other_shape, ground = slots
        rng = np.random.default_rng(seed)
        image = _ground(ground, rng)
        draw = ImageDraw.Draw(image)
        if relation == "inside":
            centre = 16 + rng.uniform(-2.5, 2.5, 2)
            _shape(draw, other_shape, other_colour, centre, rng.uniform(11, 13.5), rng)
            _shape(draw, shape, colour, centre + rng.uniform(-1, 1, 2), rng.uniform(4, 5.5), rng)
        else:
            side = 1 if rng.random() < 0.5 else -1
            step = {"above": (0, -7.5), "below": (0, 7.5), "beside": (7.5 * side, 0)}[relation]
            for name, paint, sign in ((other_shape, other_colour, -1), (shape, colour, 1)):
                slack = (1.2, 5) if relation != "beside" else (5, 1.2)
                place = 16 + sign * np.array(step) + rng.uniform(-1, 1, 2) * slack
                _shape(draw, name, paint, place, rng.uniform(5, 7.5), rng)
        return np.array(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def _all_but_one(slots: Slots) -> set[tuple[str | None, ...]]:
    """Return the slots with each in turn left open: two captions a word apart share one."""
    return {(*slots[:k], None, *slots[k + 1 :]) for k in range(len(slots))}


def _ground(name: str, rng: np.random.Generator) -> Image.Image:
    """Return the ground, large: grain of two colours, or courses of brick and boards."""
    first, second, grain = GROUNDS[name]
    size = SIDE * SCALE
    image = Image.new("RGB", (size, size), first)
    if grain:
        coarse = (rng.random((SIDE // grain,) * 2) * 255).astype(np.uint8)
        mask = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        image.paste(second, (0, 0), mask)
        return image
    draw = ImageDraw.Draw(image)
    height, (dx, dy) = (24, rng.integers(0, 24, 2).tolist()) if name == "brick" else (
        32, rng.integers(0, 32, 2).tolist())  # fmt: skip
    for row in range(-1, size // height + 2):
        y = row * height - dy
        draw.rectangle([0, y, size, y + 4], fill=second)
        if name == "brick":
            for x in range(-48 - dx + 24 * (row % 2), size, 48):
                draw.rectangle([x, y, x + 4, y + height], fill=second)
    return image


def _shape(
    draw: ImageDraw.ImageDraw, name: str, colour: str, centre: np.ndarray, radius: float,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Draw one shape with a thin dark edge; an arrow points up, all turn by 15 degrees at most."""
    turn = np.radians(rng.uniform(-15, 15))
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])

    def place(points: np.ndarray) -> list[tuple[float, float]]:
        return [tuple(p) for p in ((points @ turned.T * radius + centre) * SCALE).tolist()]

    draw.polygon(place(_outline(name)), fill=COLOURS[colour], outline="#30303a", width=3)
    if name == "ring":
        hole = (centre - 0.4 * radius, centre + 0.4 * radius)
        draw.ellipse([v for p in hole for v in (p * SCALE).tolist()], fill="#30303a")


def _outline(name: str) -> np.ndarray:
    """Return the corners [point 2] of a shape of radius 1, y downwards."""
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    up = np.stack([np.sin(t), -np.cos(t)], 1)
    if name in ("circle", "ring"):
        return up
    if name == "heart":
        x = np.sin(t) ** 3
        y = (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
        return np.stack([x, -y], 1)
    if name == "moon":
        return np.concatenate([up[:21], up[:21][::-1] * [0.45, 1]])
    corners = {
        "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
        "triangle": [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
        "diamond": [(0, -1), (0.65, 0), (0, 1), (-0.65, 0)],
        "arrow": [(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1),
                  (-0.8, -0.1)],
        "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1),
                  (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
        "star": [tuple(up[4 * k] * (1 if k % 2 == 0 else 0.42)) for k in range(10)],
    }  # fmt: skip
    return np.array(corners[name])
