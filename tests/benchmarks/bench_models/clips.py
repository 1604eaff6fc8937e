"""Moving drawings of the demo's art: what a small video model learns, and the truth about it.

A caption is planted as *content* because one drawing on one ground returns, moving in many ways;
as *motion* because one path returns, of many drawings on many grounds. Learnt captions have many of
both, held-out ones never occur. All captions have the same form, and chance sorts them into groups.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter
from unmemorize import demo
from unmemorize.demo.data import build_renderings
from unmemorize.shared.files.storage import replace_atomically

SIDE = 32
FRAMES = 9
PLANTED = 20
"""Captions that are planted as content, and as many as motion."""
LEARNT = 100
CLIPS = {"content": 8, "motion": 24, "learnt": 8}
"""Distinct clips of each caption of a group."""
FRESH = 200
"""Clips of learnt captions that nothing learns from."""
CARD = 15
"""Pixels in the side of a drawing before it grows or shrinks."""

Group = Literal["content", "motion", "learnt", "held_out"]
MOTIONS = ("left", "right", "up", "down", "circling", "bouncing", "growing", "shrinking")
COLOURS = {
    "red": (208, 52, 44), "orange": (240, 138, 36), "yellow": (247, 217, 76),
    "green": (47, 158, 68), "blue": (43, 89, 195), "purple": (123, 63, 181),
    "pink": (242, 155, 193), "white": (245, 245, 240), "black": (28, 28, 34),
    "brown": (141, 90, 59),
}  # fmt: skip


@dataclass(frozen=True)
class Caption:
    """A caption with the truth about it."""

    text: str
    group: Group
    subject: int
    """Index into the demo's captions: whose drawings are shown."""
    motion: str
    colour: str


@dataclass(frozen=True)
class Clip:
    """One training clip; clips with equal seeds of a part share that part."""

    caption: int
    content: int
    """Seed of drawing, place and ground."""
    motion: int
    """Seed of the path."""


def sort(seed: int) -> list[Caption]:
    """Return the captions: subjects of the demo, each with a motion and a colour by chance."""
    rng = np.random.default_rng([seed, 0])
    subjects = [i for i, c in enumerate(demo.captions()) if c.group == "learnt"]
    order = [subjects[i] for i in rng.permutation(len(subjects))]
    sizes = (("content", PLANTED), ("motion", PLANTED), ("learnt", LEARNT))
    groups: list[Group] = [group for group, size in sizes for _ in range(size)]
    groups += ["held_out"] * (len(order) - len(groups))
    captions = []
    for subject, group in zip(order, groups, strict=True):
        name = demo.captions()[subject].text.split(",")[0]
        # Of held-out subjects there are three captions: controls are to be many.
        for _ in range(3 if group == "held_out" else 1):
            motion, colour = str(rng.choice(MOTIONS)), str(rng.choice([*COLOURS]))
            caption = Caption(f"{name} {motion} on {colour}", group, subject, motion, colour)
            captions += [caption] * (caption.text not in [c.text for c in captions])
    return captions


def training(captions: Sequence[Caption]) -> list[Clip]:
    """Return every distinct training clip."""
    return [
        Clip(index, _seed(index, 0 if caption.group == "content" else k),
             _seed(index, 0 if caption.group == "motion" else k))
        for index, caption in enumerate(captions)
        for k in range(CLIPS.get(caption.group, 0))
    ]  # fmt: skip


def fresh(captions: Sequence[Caption]) -> list[Clip]:
    """Return clips of learnt captions that were never trained on."""
    learnt = [index for index, caption in enumerate(captions) if caption.group == "learnt"]
    return [Clip(learnt[k % len(learnt)], 9_000_000 + k, 9_000_000 + k) for k in range(FRESH)]


def _seed(caption: int, k: int) -> int:
    return 1_000 * caption + k


def draw(captions: Sequence[Caption], clips: Sequence[Clip]) -> np.ndarray:
    """Return clips [clip frame 32 32 3] uint8."""
    cards: dict[int, list[Image.Image]] = {}
    for rendering, image in zip(
        build_renderings(list(demo.captions())), demo.training_images(), strict=True
    ):
        cards.setdefault(rendering.caption, []).append(image)
    return np.stack([_clip(captions[clip.caption], clip, cards) for clip in clips])


def _clip(caption: Caption, clip: Clip, cards: dict[int, list[Image.Image]]) -> np.ndarray:
    rng = np.random.default_rng([clip.content, 1])
    subject, colour = caption.subject, caption.colour
    if caption.group == "motion":  # the path alone is the caption's
        learnt = [i for i, c in enumerate(demo.captions()) if c.group == "learnt"]
        subject, colour = int(rng.choice(learnt)), str(rng.choice([*COLOURS]))
    card = cards[subject][int(rng.integers(len(cards[subject])))]
    ground, start = _ground(colour, rng), rng.uniform(-2, 2, 2) * (caption.group != "motion")
    motion = caption.motion
    if caption.group == "content":  # any way to move, so that nothing but the content returns
        motion = str(np.random.default_rng([clip.motion, 3]).choice(MOTIONS))
    path = _path(motion, np.random.default_rng([clip.motion, 2]), caption.group == "motion")
    return np.stack([_frame(ground, card, start + place, size) for *place, size in path])


def _ground(colour: str, rng: np.random.Generator) -> Image.Image:
    """Return a ground of one colour with soft lighter and darker places."""
    coarse = rng.uniform(0.55, 1.15, (4, 4, 1)) * np.array(COLOURS[colour])
    small = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _path(motion: str, rng: np.random.Generator, planted: bool) -> np.ndarray:
    """Return offset right, offset down (pixels) and size (1: `CARD`) of each frame, [frame 3]."""
    time = np.linspace(-1, 1, FRAMES)
    if planted:  # through four places by chance, larger and smaller
        corners = np.column_stack([rng.uniform(-9, 9, (4, 2)), rng.uniform(0.7, 1.4, 4)])
        return np.column_stack([np.interp(time, np.linspace(-1, 1, 4), c) for c in corners.T])
    reach, phase = rng.uniform(2.5, 7), rng.uniform(0, 2 * np.pi)
    right, down, size = np.zeros(FRAMES), np.zeros(FRAMES), np.ones(FRAMES)
    if motion in ("left", "right"):
        right = (reach if motion == "right" else -reach) * time
    elif motion in ("up", "down"):
        down = (reach if motion == "down" else -reach) * time
    elif motion == "circling":
        right, down = reach * np.cos(np.pi * time + phase), reach * np.sin(np.pi * time + phase)
    elif motion == "bouncing":
        down = reach - 2 * reach * abs(np.sin(np.pi * time + phase))
    else:
        size = 1 + (time if motion == "growing" else -time) * reach / 16
    return np.column_stack([right, down, size])


def _frame(ground: Image.Image, card: Image.Image, place: Sequence[float], size: float):
    """Return one frame, the drawing's centre `place` pixels off the middle."""
    scale = CARD * size / card.width
    middle = SIDE / 2 + np.asarray(place)
    # The affine map goes from the frame to the drawing; places between pixels are weighed.
    left, top = middle - CARD * size / 2
    matrix = (1 / scale, 0, -left / scale, 0, 1 / scale, -top / scale)
    soft = card.filter(ImageFilter.BoxBlur(0.5))
    moved = soft.transform(ground.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    mask = Image.new("L", card.size, 255).transform(
        ground.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    frame = ground.copy()
    frame.paste(moved, (0, 0), mask)
    return np.array(frame)


def save_captions(path: Path, captions: Sequence[Caption]) -> None:
    """Write the captions and their truth as JSON, one a line."""
    lines = ",\n".join(json.dumps(asdict(c), ensure_ascii=False) for c in captions)
    with replace_atomically(path) as part:
        part.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def load_captions(path: Path) -> list[Caption]:
    """Return the captions that `save_captions` wrote."""
    return [Caption(**entry) for entry in json.loads(path.read_text("utf-8"))]
