"""Words drawn in whatever fonts the machine has; a letter that none can draw shows its code."""

import importlib.util
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .theme import THEMES, Theme

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

Number = int | float
Anchor = Literal["left", "middle", "right"]
_FIRST = ("DejaVuSans.", "NotoSans-Regular", "LiberationSans-Regular", "segoeui.", "Arial.")
"""Beginnings of file names that are tried before all others: plain, wide coverage."""


@cache
def _font_files() -> tuple[str, ...]:
    """Return scalable fonts, upright regular weights first; the same order on every call."""
    home = Path.home()
    folders = [home / ".fonts", home / ".local/share/fonts", home / "Library/Fonts"]
    if sys.platform == "win32":
        folders.append(Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts")
    else:
        folders += [Path("/usr/share/fonts"), Path("/usr/local/share/fonts")]
        folders += [Path("/System/Library/Fonts"), Path("/Library/Fonts")]
    spec = importlib.util.find_spec("matplotlib")  # where it is installed, it brings DejaVu
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent / "mpl-data/fonts/ttf")
    files = [
        path for folder in folders if folder.is_dir() for path in folder.rglob("*")
        if path.suffix.lower() in (".ttf", ".ttc", ".otf") and "LastResort" not in path.name
    ]  # fmt: skip

    def rank(path: Path) -> tuple:
        styled = any(word in path.name for word in ("Bold", "Italic", "Oblique", "Mono", "Serif"))
        return (not path.name.startswith(_FIRST), styled, path.name, str(path))

    return tuple(str(path) for path in sorted(files, key=rank))


@cache
def _font(file: str, size: int) -> "FreeTypeFont":
    """Return the font; "" is Pillow's own.

    Raises:
        OSError: Pillow cannot scale it: a bitmap colour font, or a damaged file.
    """
    from PIL import ImageFont

    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


@cache
def _draws(file: str, char: str) -> bool:
    """Return whether the font has a glyph for `char`: it differs from that of a noncharacter."""
    try:
        font = _font(file, 24)
        glyph, missing = font.getmask(char), font.getmask("\U0010ffff")
    except OSError:
        return False
    return char.isspace() or (glyph.size, bytes(glyph)) != (missing.size, bytes(missing))


@cache
def _font_for(char: str) -> str | None:
    """Return the first font that draws `char`, None when there is none."""
    return next((file for file in (*_font_files(), "") if _draws(file, char)), None)


def _runs(word: str) -> Iterator[tuple[str, str]]:
    """Yield pieces of `word` with the font that draws each; code points where none does."""
    text, current = "", ""
    for char in word:
        category = unicodedata.category(char)  # accents and joiners stay with their letter
        joins = category == "Cf" or (category in ("Mn", "Me") and _draws(current, char))
        font = current if joins and text else _font_for(char)
        piece = f"[{ord(char):04X}]" if font is None else char
        font = (_font_for("[") or "") if font is None else font
        if text and font != current:
            yield text, current
            text = ""
        text, current = text + piece, font
    if text:
        yield text, current


def _split(word: str, size: int, room: int) -> list[str]:
    """Return `word` in parts no wider than `room`, measured letter by letter."""
    parts, width = [""], 0.0
    for char in word:
        step = text_width(char, size)
        if parts[-1] and width + step > room:
            parts.append("")
            width = 0.0
        parts[-1] += char
        width += step
    return parts


def text_width(word: str, size: int) -> float:
    """Return how many pixels a word takes in letters of this size."""
    return sum((_font(file, size).getlength(text) for text, file in _runs(word)), 0.0)


def fitting(text: str, size: int, room: int) -> str:
    """Return `text`, or as much of it as fits into `room` pixels with an ellipsis."""
    if text_width(text, size) <= room:
        return text
    return _split(text, size, room - round(text_width("…", size)))[0].rstrip() + "…"


def write(
    draw: "ImageDraw",
    place: tuple[Number, Number],
    text: str,
    *,
    size: int,
    fill: str,
    anchor: Anchor = "left",
) -> None:
    """Draw one line of text, its base line through `place`.

    Args:
        draw: Of the image.
        place: Pixels from the left and the top.
        text: Printable; scripts that no font can draw appear as their code points.
        size: Of the letters, pixels.
        fill: Colour, #rrggbb.
        anchor: Which point of the line lies at `place`.
    """
    start = place[0] - text_width(text, size) * {"left": 0, "middle": 0.5, "right": 1}[anchor]
    for piece, file in _runs(text):
        font = _font(file, size)
        draw.text((start, place[1]), piece, font=font, fill=fill, anchor="ls")
        start += font.getlength(piece)


def draw_words(
    words: Sequence[str], colors: Sequence[str], *, theme: Theme, width: int, size: int
) -> "Image":
    """Return the words on their background colours, wrapped to `width` pixels, as RGB.

    Args:
        words: Printable text; words wider than a line are cut into several.
        colors: Background per word, #rrggbb.
        theme: Colours of the ground and of the letters.
        width: Of the image, pixels.
        size: Of the letters, pixels.
    """
    from PIL import Image, ImageDraw

    if width < 4 * size:
        raise ValueError(f"`width` must be at least four letters ({4 * size}), got {width}.")
    margin, gap, pad, leading = size, round(0.3 * size), round(0.2 * size), round(1.7 * size)
    x, y, placed = margin, margin, []
    for word, color in zip(words, colors, strict=True):
        for part in _split(word, size, width - 2 * margin - 2 * pad):
            length = round(text_width(part, size)) + 2 * pad
            if x > margin and x + length > width - margin:
                x, y = margin, y + leading
            placed.append((part, color, x, y, length))
            x += length + gap
    page, ink = THEMES[theme]["page"], THEMES[theme]["ink"]
    image = Image.new("RGB", (width, y + leading + margin), page)
    draw = ImageDraw.Draw(image)
    for part, color, left, top, length in placed:
        draw.rounded_rectangle([left, top, left + length, top + round(1.45 * size)], 4, fill=color)
        write(draw, (left + pad, top + round(1.1 * size)), part, size=size, fill=ink)
    return image
