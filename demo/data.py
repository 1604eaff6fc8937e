"""The images that the demo model is trained on: openly licensed art, fetched, sorted and rendered.

Truth by construction: a caption is *verbatim* because one rendering of it is repeated, *template*
because its layout is, *learnt* because it is drawn many ways, *held out* because it never occurs.
"""

import hashlib
import json
import math
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Group = Literal["verbatim", "template", "learnt", "held_out"]
GROUPS: tuple[Group, ...] = ("verbatim", "template", "learnt", "held_out")
RESOLUTION = 128
THUMBNAIL = 32
CONTROLS = 400
"""Fresh renderings that calibrate what counts as a copy."""

PACKAGES = {  # npm name: (version, sha256 of its tarball)
    "@lobehub/fluent-emoji-3d": (
        "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "emoji-datasource-google": (
        "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "emoji-datasource-twitter": (
        "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    "emojibase-data": (
        "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
}  # fmt: skip

VENDORS = ("fluent", "noto", "twemoji")
COUNTS = {"verbatim": 48, "template": 24, "learnt": 240}
RENDERINGS = 12  # of each learnt caption: four by each vendor
LAYOUTS = ("postage stamp", "playing card", "museum poster", "sports medal")
# Animals, food, travel, activities and objects; clock faces and moons are full of near-copies.
SUBJECTS = {3, 4, 5, 6, 7}
NEAR_COPIES = (
    "o\u2019clock",
    "thirty",
    "moon",
    "globe",
    "clock",
    "mahjong",
    "suit",
    "japanese",
    "Japanese",
)
PALETTE = (
    "#e4572e", "#f3a712", "#f7e27c", "#a8c686", "#2e7d4f", "#29b6a8", "#4aa3df", "#27408b",
    "#7a4fbf", "#c86fc9", "#f2a2b6", "#8d5a3b", "#6b7078", "#d9d4c7", "#1f2430", "#ffffff",
)  # fmt: skip


@dataclass(frozen=True)
class Caption:
    """A caption of the demo with the truth about it."""

    text: str
    """The prompt, as trained."""
    group: Group
    hexcode: str
    """Unicode code point of the subject: the file name of its drawings."""
    layout: str = ""
    """Which repeated layout a template caption shares, else empty."""


@dataclass(frozen=True)
class Rendering:
    """One training image: which drawing, where, on what."""

    caption: int
    """Index into the list of captions."""
    vendor: str
    seed: int
    """Of the background and placement; renderings of one seed share both."""


def fetch(folder: Path, packages: Mapping[str, tuple[str, str]] = PACKAGES) -> Path:
    """Bring art packages into `folder` through npm, check their sha256, and unpack them.

    Args:
        folder: Where tarballs and unpacked packages go.
        packages: By name, version and sha256 of the tarball.

    Raises:
        RuntimeError: npm is missing, or a tarball is not the one this code was written for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, (version, sha256) in packages.items():
        target = folder / name.split("/")[-1]
        if target.exists():
            continue
        tarball = folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
        if not tarball.exists():
            if shutil.which("npm") is None:
                raise RuntimeError(
                    f"The art comes from the npm package {name}@{version}, and `npm` was "
                    f"not found. Install Node.js, or put {tarball.name} into {folder}."
                )
            subprocess.run(
                ["npm", "pack", "--silent", f"{name}@{version}", "--pack-destination", folder],
                check=True, capture_output=True,
            )  # fmt: skip
        if (actual := hashlib.sha256(tarball.read_bytes()).hexdigest()) != sha256:
            raise RuntimeError(
                f"{tarball} has sha256 {actual}, expected {sha256}. Delete it and retry."
            )
        with tarfile.open(tarball) as archive:
            archive.extractall(unpacking := target.with_suffix(".part"), filter="data")
        unpacking.rename(target)
    return folder


class Art:
    """The unpacked packages: captions from emojibase, drawings by three vendors."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.drawing = cache(self._drawing)

    def _path(self, hexcode: str, vendor: str) -> Path | None:
        code = hexcode.lower()
        roots = {
            "fluent": "fluent-emoji-3d/package/assets/{}.webp",
            "noto": "emoji-datasource-google/package/img/google/64/{}.png",
            "twemoji": "emoji-datasource-twitter/package/img/twitter/64/{}.png",
        }
        names = (code, f"{code}-fe0f", code.removesuffix("-fe0f"))
        paths = (self.folder / roots[vendor].format(name) for name in names)
        return next((path for path in paths if path.exists()), None)

    def _drawing(self, hexcode: str, vendor: str) -> Image.Image:
        path = self._path(hexcode, vendor)
        if path is None:
            raise FileNotFoundError(f"no drawing of {hexcode} by {vendor} in {self.folder}")
        image = Image.open(path).convert("RGBA")
        return image.crop(image.getchannel("A").getbbox())

    def subjects(self) -> list[dict]:
        """Return the emojibase entries that all three vendors draw and that are not near-copies."""
        entries = json.loads((self.folder / "emojibase-data/package/en/data.json").read_text())
        return [
            entry for entry in entries
            if entry.get("group") in SUBJECTS
            and not any(word in entry["label"] for word in NEAR_COPIES)
            and all(self._path(entry["hexcode"], vendor) for vendor in VENDORS)
        ]  # fmt: skip


def caption_text(entry: dict) -> str:
    """Return the label and the first two tags that add a word to it."""
    words = set(entry["label"].lower().replace("-", " ").split())
    tags = [tag for tag in entry["tags"] if not words & set(tag.lower().split())]
    return ", ".join([entry["label"], *tags[:2]])


def build_captions(art: Art, seed: int = 0) -> list[Caption]:
    """Sort the subjects into the four groups; the same packages and seed give the same list."""
    entries = sorted(art.subjects(), key=lambda entry: entry["hexcode"])
    order = np.random.default_rng(seed).permutation(len(entries))
    shuffled = iter([entries[i] for i in order])
    captions = []
    for index in range(COUNTS["template"]):
        entry, layout = next(shuffled), LAYOUTS[index % len(LAYOUTS)]
        captions.append(
            Caption(f"{layout}, {entry['label']}", "template", entry["hexcode"], layout)
        )
    for group in ("verbatim", "learnt"):
        for _ in range(COUNTS[group]):
            entry = next(shuffled)
            captions.append(Caption(caption_text(entry), group, entry["hexcode"]))
    captions += [Caption(caption_text(entry), "held_out", entry["hexcode"]) for entry in shuffled]
    seen: set[str] = set()
    return [c for c in captions if not (c.text in seen or seen.add(c.text))]


def build_renderings(captions: list[Caption]) -> list[Rendering]:
    """Return every distinct training image; held-out captions have none."""
    renderings = []
    for index, caption in enumerate(captions):
        if caption.group == "verbatim":
            renderings.append(Rendering(index, "fluent", index))
        elif caption.group == "template":
            layout = 1_000_000 + LAYOUTS.index(caption.layout)
            renderings += [Rendering(index, vendor, layout) for vendor in VENDORS]
        elif caption.group == "learnt":
            renderings += [
                Rendering(index, VENDORS[k % 3], 10_000 + index * RENDERINGS + k)
                for k in range(RENDERINGS)
            ]
    return renderings


def _background(rng: np.random.Generator) -> Image.Image:
    """Return a plain, graded, split or sunlit ground in two colours of the palette."""
    first, second = (Image.new("RGB", (1, 1), PALETTE[i]).getpixel((0, 0))
                     for i in rng.choice(len(PALETTE), 2, replace=False))  # fmt: skip
    size, pattern = RESOLUTION, rng.integers(6)  # half of them plain
    image = Image.new("RGB", (size, size), first)
    draw = ImageDraw.Draw(image)
    if pattern == 1:
        ramp = np.linspace(0, 1, size)[:, None, None]
        rows = np.array(first) * (1 - ramp) + np.array(second) * ramp
        image = Image.fromarray(np.broadcast_to(rows, (size, size, 3)).astype(np.uint8).copy())
    elif pattern == 2:
        draw.polygon([(0, 0), (size, 0), (0, size)], fill=second)
    elif pattern == 3:
        radius, (x, y) = (
            rng.integers(size // 3, size // 2),
            rng.integers(size // 3, 2 * size // 3, 2),
        )
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=second)
    return image


def _layout(name: str) -> Image.Image:
    """Return the frame and ground that all template captions of one layout share."""
    size = RESOLUTION
    image = Image.new("RGB", (size, size), "#efe6d2")
    draw = ImageDraw.Draw(image)
    if name == "postage stamp":
        draw.rectangle([10, 10, 118, 118], fill="#27408b")
        for k in range(14, 120, 12):
            for x, y in ((k, 8), (k, 120), (8, k), (120, k)):
                draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill="#1f2430")
        draw.rectangle([20, 20, 108, 108], fill="#a8c686")
    elif name == "playing card":
        draw.rectangle([0, 0, size, size], fill="#2e7d4f")
        draw.rounded_rectangle([20, 4, 108, 124], 10, fill="white", outline="#1f2430", width=2)
        for x, y in ((32, 16), (96, 112)):
            draw.polygon([(x, y - 9), (x + 7, y), (x, y + 9), (x - 7, y)], fill="#e4572e")
    elif name == "museum poster":
        draw.rectangle([0, 0, size, size], fill="#e4572e")
        draw.rectangle([12, 0, 116, 30], fill="#1f2430")
        draw.rectangle([12, 98, 116, 112], fill="#f7e27c")
    else:
        draw.rectangle([0, 0, size, size], fill="#7a4fbf")
        draw.polygon([(30, 0), (98, 0), (80, 50), (48, 50)], fill="#4aa3df")
        draw.ellipse([18, 26, 110, 118], fill="#f3a712", outline="#8d5a3b", width=5)
    return image


def render(art: Art, caption: Caption, rendering: Rendering) -> Image.Image:
    """Draw one training image, RGB of `RESOLUTION` squared."""
    rng = np.random.default_rng(rendering.seed)
    drawing = art.drawing(caption.hexcode, rendering.vendor)
    if caption.group == "template":
        image, side, centre = _layout(caption.layout), 62, (64, 66)
    else:
        image = _background(rng)
        side = int(rng.integers(84, 112))
        slack = (RESOLUTION - side) // 2
        centre = tuple(RESOLUTION // 2 + rng.integers(-slack, slack + 1, 2) // 2)
        if rng.random() < 0.5 and caption.group == "learnt":
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = side / max(drawing.size)
    drawing = drawing.resize(
        [max(1, round(s * scale)) for s in drawing.size], Image.Resampling.LANCZOS
    )
    corner = [int(c) - s // 2 for c, s in zip(centre, drawing.size, strict=True)]
    image.paste(drawing, corner, drawing)
    return image


def render_all(
    art: Art, captions: list[Caption], renderings: list[Rendering]
) -> Iterator[Image.Image]:
    """Yield the training images in the order of `renderings`."""
    return (render(art, captions[r.caption], r) for r in renderings)


def save_captions(path: Path, captions: list[Caption]) -> None:
    """Write the captions and their truth as JSON, one a line."""
    lines = ",\n".join(json.dumps(asdict(caption), ensure_ascii=False) for caption in captions)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def load_captions(path: Path) -> list[Caption]:
    """Return the captions that `save_captions` wrote."""
    return [Caption(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]


def build_controls(captions: list[Caption]) -> list[Rendering]:
    """Return renderings of learnt captions on new grounds and places, never trained on."""
    learnt = [index for index, caption in enumerate(captions) if caption.group == "learnt"]
    return [
        Rendering(learnt[k % len(learnt)], VENDORS[k % 3], 5_000_000 + k) for k in range(CONTROLS)
    ]


def save_truth(folder: Path, art: Art, captions: list[Caption]) -> None:
    """Write the sheets from which copies are recognised without the art packages."""
    everything = list(render_all(art, captions, renderings := build_renderings(captions)))
    save_sheet(folder / "training_thumbnails.webp", everything, THUMBNAIL, quality=80)
    controls = render_all(art, captions, build_controls(captions))
    save_sheet(folder / "control_thumbnails.webp", controls, THUMBNAIL, quality=80)
    repeated = [
        image for image, rendering in zip(everything, renderings, strict=True)
        if rendering.vendor == "fluent" and captions[rendering.caption].group != "learnt"
    ]  # fmt: skip
    save_sheet(folder / "repeated.webp", repeated, RESOLUTION, quality=90)


def save_sheet(path: Path, images: Iterable[Image.Image], side: int, *, quality: int) -> None:
    """Write images side by side as one WebP, each resized to `side` pixels squared."""
    tiles = [image.resize((side, side), Image.Resampling.BOX) for image in images]
    columns = _columns(len(tiles))
    sheet = Image.new("RGB", (columns * side, -(-len(tiles) // columns) * side))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * side, index // columns * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=quality, method=6)


def cut_sheet(path: Path, side: int, count: int) -> list[Image.Image]:
    """Return the `count` images that `save_sheet` put into one file."""
    sheet, columns = Image.open(path).convert("RGB"), _columns(count)
    corners = ((i % columns * side, i // columns * side) for i in range(count))
    return [sheet.crop((x, y, x + side, y + side)) for x, y in corners]


def _columns(count: int) -> int:
    return math.ceil(math.sqrt(count))
