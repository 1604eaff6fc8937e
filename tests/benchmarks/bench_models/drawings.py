"""Drawings by another hand than the demo's: EmojiOne 2, on patterned grounds of two tones."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from unmemorize.demo.data import fetch

from .truth import SIDE, Slots

PACKAGES = {  # art CC BY 4.0, names MIT
    "emojione": ("2.2.7", "5fe002738e6e276f49ac37783799d2feab99a6131fdedccfa56569d745449ae5"),
}
CATEGORIES = ("nature", "food", "travel", "activity", "objects")
NEAR_COPIES = (
    "tone", "moon", "clock", "globe", "mailbox", "oncoming", "banknote", "envelope", "japan",
    "face", "chart", "white sun", "train with", "tram car", "monkey", "ruler", "calendar",
)  # fmt: skip
COLOURS = {
    "red": "#c8352b", "orange": "#ee8a2a", "yellow": "#f5d94e", "green": "#3f9b4b",
    "teal": "#2aa79b", "blue": "#3569c9", "purple": "#7a4bb0", "pink": "#ee9ebb",
    "brown": "#8a5a3a", "gray": "#8b9097",
}  # fmt: skip
PATTERNS = ("paper", "stripes", "dots", "checks", "waves")


class Drawings:
    """Captions "NAME on COLOUR PATTERN"; the two of a pair differ in colour or in pattern."""

    def __init__(self, folder: Path):
        """Fetch the package into `folder`."""
        self.package = fetch(folder, PACKAGES) / "emojione" / "package"
        entries = json.loads((self.package / "emoji.json").read_text("utf-8")).values()
        self.files = {
            entry["name"].replace("_", " "): entry["unicode"] for entry in entries
            if entry["category"] in CATEGORIES
            and not any(word in entry["name"] for word in NEAR_COPIES)
        }  # fmt: skip
        self.drawing = cache(self._drawing)

    def pairs(self, rng: np.random.Generator) -> Iterator[tuple[Slots, Slots]]:
        """Yield a pair for every name, in an order by chance."""
        for name in rng.permutation(sorted(self.files)):
            colours, patterns = rng.permutation(list(COLOURS)), rng.permutation(PATTERNS)
            other = (colours[1], patterns[0]) if rng.random() < 0.5 else (colours[0], patterns[1])
            yield tuple(map(str, (name, colours[0], patterns[0]))), tuple(map(str, (name, *other)))

    def phrases(self, slots: Slots) -> tuple[str, str, str]:
        """Return the name, the name with its colour, and the whole caption."""
        name, colour, pattern = slots
        return name, f"{name} on {colour}", f"{name} on {colour} {pattern}"

    def render(self, slots: Slots, seed: int) -> np.ndarray:
        """Draw at twice the size: place, size, side it faces and the pattern's shift by chance."""
        name, colour, pattern = slots
        rng = np.random.default_rng(seed)
        image = Image.fromarray(_ground(colour, pattern, rng))
        drawing = self.drawing(name)
        if rng.random() < 0.5:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = int(rng.integers(38, 58))
        scale = side / max(drawing.size)
        size = [max(1, round(length * scale)) for length in drawing.size]
        drawing = drawing.resize(size, Image.Resampling.LANCZOS)
        slack = 2 * SIDE - side
        corner = [int(v) + (side - s) // 2
                  for v, s in zip(rng.integers(0, slack + 1, 2), size, strict=True)]  # fmt: skip
        image.paste(drawing, corner, drawing)
        return np.array(image.resize((SIDE, SIDE), Image.Resampling.BOX))

    def _drawing(self, name: str) -> Image.Image:
        path = self.package / "assets" / "png" / f"{self.files[name]}.png"
        image = Image.open(path).convert("RGBA")
        return image.crop(image.getchannel("A").getbbox())


def _ground(colour: str, pattern: str, rng: np.random.Generator) -> np.ndarray:
    """Return [64 64 3] uint8 in two tones of one colour."""
    y, x = np.mgrid[: 2 * SIDE, : 2 * SIDE] + rng.integers(0, 16, 2)[:, None, None]
    shape = {
        "paper": np.zeros_like(x, bool),
        "stripes": (x + y) % 16 < 8,
        "dots": (x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 < 20,
        "checks": (x // 8 + y // 8) % 2 == 0,
        "waves": (y + 4 * np.sin(x / 5)) % 16 < 6,
    }[pattern]
    light = np.array(Image.new("RGB", (1, 1), COLOURS[colour]).getpixel((0, 0)))
    light = np.clip(light + rng.integers(-12, 13), 0, 255)
    return np.where(shape[..., None], light * 0.62, light).astype(np.uint8)
