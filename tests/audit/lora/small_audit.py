"""A real LoRA that gives three drawings back, its folder, and pictures it never saw."""

import importlib.util
import random
from pathlib import Path

from PIL import Image, ImageDraw

EXAMPLE = Path("example_workflows") / "loras" / "unmemorize_demo.py"
HELD_OUT = 13
"""With the three drawings enough controls for a threshold."""


def example_lora(root: Path) -> Path:
    """Return the LoRA of the example workflow."""
    return (root / EXAMPLE).with_suffix(".safetensors")


def write_drawings(root: Path, folder: Path) -> Path:
    """Write the drawings that the example's LoRA was trained on, with their captions."""
    spec = importlib.util.spec_from_file_location("example", root / EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder.mkdir()
    for place, caption in enumerate(example.DRAWINGS):
        example.draw(caption).save(folder / f"{place}.png")
        (folder / f"{place}.txt").write_text(caption, encoding="utf-8")
    return folder


def write_others(folder: Path, count: int = HELD_OUT) -> Path:
    """Write drawings of the same kind, without captions: shapes on a plain ground."""
    folder.mkdir()
    for place in range(count):
        rng = random.Random(place)
        image = Image.new("RGB", (128, 128), _colour(rng))
        pen = ImageDraw.Draw(image)
        for _ in range(4):
            x, y = rng.randrange(95), rng.randrange(95)
            box = (x, y, x + rng.randrange(15, 60), y + rng.randrange(15, 60))
            rng.choice([pen.ellipse, pen.rectangle])(box, fill=_colour(rng))
        image.save(folder / f"{place:02d}.png")
    return folder


def _colour(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(256) for _ in range(3))
