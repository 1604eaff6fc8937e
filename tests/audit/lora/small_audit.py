"""A real LoRA that gives three drawings back, its folder, and pictures it never saw."""

import dataclasses
import importlib.util
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from unmemorize.audit.common.measure import SilentBar
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.run import run_lora_audit

EXAMPLE = Path("example_workflows") / "loras" / "unmemorize_demo.py"
HELD_OUT = 13
"""With the three drawings enough controls for a threshold."""
WRITTEN = ("report.html", "audit.json", "model_card.md", "badge.svg", "similarity.npz")


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


class Stopped(SilentBar):
    """A bar at which the user presses Ctrl-C."""

    def __init__(self, left: list[int]):
        self.left = left

    def update(self, n: int) -> None:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise KeyboardInterrupt


def stopped_and_continued(config: LoraAuditConfig, output: Path) -> list[str]:
    """Return which files of a finished audit differ from those of one that was stopped.

    It starts in `output` from the finished job without its last images, scores and files, and is
    stopped once more on the way.
    """
    shutil.copytree(config.output, output)
    images = sorted(output.glob("images/*.png"))
    for path in images[len(images) - 9 :]:
        path.unlink()
    for name in (*WRITTEN, "journal/words.jsonl"):
        (output / name).unlink(missing_ok=name not in WRITTEN)
    scores = output / "journal" / "scores.jsonl"
    scores.write_bytes(scores.read_bytes()[:-40])
    again, left = dataclasses.replace(config, output=output), [6]
    with pytest.raises(KeyboardInterrupt):
        run_lora_audit(again, lambda *_: Stopped(left))
    assert not (output / "audit.json").exists()
    assert "Not all was asked." in (output / "report.html").read_text("utf-8")
    run_lora_audit(again)
    assert "Not all was asked." not in (output / "report.html").read_text("utf-8")
    pictures = (path.relative_to(config.output).as_posix() for path in config.output.rglob("*.png"))
    return [
        name for name in (*WRITTEN, *pictures)
        if (config.output / name).read_bytes() != (output / name).read_bytes()
    ]  # fmt: skip
