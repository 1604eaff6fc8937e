"""Training sets of one character or one style, and what a LoRA draws that learnt it and no image.

Same subject, same pose: only colours, a hat, a mouth and a few pixels of place tell the images of a
character apart. What such a LoRA draws is one more image of the same kind; what the base model
draws shares no more than the medium. A copy is one of the images, coarser and a little darker.
"""

import colorsys
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from known_sets import Made, Trained, saved
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

SIDE = 128
SKIN, HAIR, INK = "#f0c8a0", "#3b2417", "#30303a"
MOUTHS = ((0, 180), (180, 360), (20, 160), (0, 360))


def paint(rng: random.Random, least: float, most: float) -> tuple[int, ...]:
    """Return any colour of a saturation between two, 0 to 1."""
    value = rng.uniform(0.35, 0.95) if most > 0.5 else rng.uniform(0.75, 0.97)
    colour = colorsys.hsv_to_rgb(rng.random(), rng.uniform(least, most), value)
    return tuple(round(255 * part) for part in colour)


def character(rng: random.Random) -> Image.Image:
    """Return an image of one character in one pose."""
    image = Image.new("RGB", (SIDE, SIDE), paint(rng, 0.05, 0.35))
    pen, x, y = ImageDraw.Draw(image), 64 + rng.randrange(-4, 5), 58 + rng.randrange(-3, 4)
    pen.rounded_rectangle(
        (x - 34, y + 32, x + 34, 140), 18, fill=paint(rng, 0.2, 0.9), outline=INK, width=2
    )
    if rng.random() < 0.5:
        pen.rectangle((x - 5, y + 34, x + 5, 128), fill=paint(rng, 0.2, 0.9))
    pen.ellipse((x - 34, y - 40, x + 34, y + 30), fill=HAIR)
    pen.ellipse((x - 27, y - 26, x + 27, y + 36), fill=SKIN, outline=INK, width=2)
    look = rng.randrange(-3, 4)
    for eye in (x - 11, x + 11):
        pen.ellipse((eye - 5, y - 4, eye + 5, y + 8), fill="white", outline=INK)
        pen.ellipse((eye - 2 + look, y, eye + 2 + look, y + 5), fill=INK)
    pen.arc((x - 9, y + 10, x + 9, y + 24), *rng.choice(MOUTHS), fill="#a03030", width=3)
    if rng.random() < 0.4:
        hat = paint(rng, 0.2, 0.9)
        pen.rectangle((x - 30, y - 40, x + 30, y - 26), fill=hat)
        pen.rectangle((x - 20, y - 56, x + 20, y - 38), fill=hat)
    return image


def style(rng: random.Random) -> Image.Image:
    """Return an image of one style: flat shapes in few colours on paper, thick outlines."""
    image = Image.new("RGB", (SIDE, SIDE), paint(rng, 0.02, 0.1))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randrange(3, 6)):
        w, h = rng.randrange(24, 70), rng.randrange(24, 70)
        x, y = rng.randrange(0, SIDE - w), rng.randrange(0, SIDE - h)
        kind = rng.choice((pen.ellipse, pen.rectangle))
        kind((x, y, x + w, y + h), fill=paint(rng, 0.2, 0.9), outline=INK, width=4)
    return image


def unrelated(rng: random.Random) -> Image.Image:
    """Return an image of a base model that knows neither: soft patches of colour."""
    image = Image.new("RGB", (5, 5))
    image.putdata([tuple(rng.randrange(30, 230) for _ in range(3)) for _ in range(25)])
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def copy_of(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return an image as a model gives it back."""
    coarse = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))
    return ImageEnhance.Brightness(coarse).enhance(rng.uniform(0.92, 1.06))


KINDS: dict[str, Callable[[random.Random], Image.Image]] = {
    "character": character, "style": style,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A folder of one kind, and what a LoRA draws that gives the first of its images back."""

    kind: str
    count: int
    seed: int
    copies: int = 0
    shared: bool = False
    """One caption for all."""
    seeds: int = 2
    others: int = 8
    """Images of no words, with the LoRA and without."""

    def write(self, folder: Path) -> tuple[list[Trained], list[Made]]:
        """Write all images and return them."""
        rng, draw = random.Random(f"{self.kind} {self.seed}"), KINDS[self.kind]
        images = [draw(rng) for _ in range(self.count)]
        captions = ["zorp" if self.shared else f"zorp, {place}" for place in range(self.count)]
        trained = [
            Trained(path=saved(image, folder / f"{place}.png"), caption=captions[place],
                    trip=saved(copy_of(image, random.Random(0)), folder / f"{place}-trip.png"),
                    back=place < self.copies)
            for place, image in enumerate(images)
        ]  # fmt: skip
        asked = [(caption, place) for place, caption in enumerate(captions)] * self.seeds
        made = []
        for number, (prompt, place) in enumerate(asked + [("", self.count)] * self.others):
            on = images[place] if place < self.copies else draw(rng)
            for lora, image in ((True, copy_of(on, rng)), (False, unrelated(rng))):
                path = saved(image, folder / f"made-{number}-{'on' if lora else 'off'}.png")
                made.append(Made(path=path, prompt=prompt, seed=number, lora=lora))
        return trained, made
