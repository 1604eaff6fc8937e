"""Prompts in colour can be read, and nothing in them runs; maps glow where they are high."""

import itertools
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from unmemorize.shared.drawing.heatmap import (
    LEVELS,
    level_color,
    overlay_map,
    prompt_heatmap_html,
    prompt_heatmap_png,
    word_levels,
)
from unmemorize.shared.drawing.theme import THEMES

THEME = pytest.mark.parametrize("theme", ["light", "dark"])


class Reader(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))

    def handle_data(self, data):
        self.text += data


def luminance(color: str) -> float:
    """WCAG 2.2 relative luminance, written out."""
    total = 0.0
    for weight, start in ((0.2126, 1), (0.7152, 3), (0.0722, 5)):
        channel = int(color[start : start + 2], 16) / 255
        linear = channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        total += weight * linear
    return total


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_the_one_of_the_standard():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@THEME
def test_every_word_can_be_read(theme):
    ink = THEMES[theme]["ink"]
    worst = min(contrast(level_color(level, theme), ink) for level in range(LEVELS + 1))
    assert worst >= 4.5
    for role in ("muted", "flagged"):
        assert contrast(THEMES[theme][role], THEMES[theme]["page"]) >= 4.5
    for role in ("other", "control"):  # dots, not letters
        assert contrast(THEMES[theme][role], THEMES[theme]["page"]) >= 3


@THEME
def test_color_moves_away_from_the_page_with_every_level(theme):
    steps = [contrast(level_color(level, theme), level_color(0, theme)) for level in range(21)]
    assert level_color(0, theme) == THEMES[theme]["page"]
    assert all(a < b for a, b in itertools.pairwise(steps))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_levels_are_monotone_in_significance(values):
    levels = word_levels(values)
    for a, la in zip(values, levels, strict=True):
        for b, lb in zip(values, levels, strict=True):
            assert a > b or la <= lb
    assert max(levels) == (LEVELS if max(values) > 0 else 0)


def test_levels_do_not_depend_on_the_unit_and_survive_nonsense():
    assert word_levels([1.0, 2.0, 4.0]) == word_levels([10.0, 20.0, 40.0]) == [5, 10, 20]
    assert word_levels([0.0, 0.0]) == [0, 0]
    assert word_levels([math.nan, 1.0, math.inf, -3.0]) == [0, 20, 0, 0]
    assert word_levels([]) == []


def test_heatmap_shows_each_word_with_its_number():
    read = Reader(prompt_heatmap_html(["red", "fox"], [0.25, 1.0], style=False))
    assert read.text == "red fox"
    assert read.tags == ["bdi", "span", "span"]
    assert [a.get("class") for a in read.attributes] == ["heatmap", "w5", "w20"]
    assert [a.get("title") for a in read.attributes[1:]] == ["red: 0.25", "fox: 1"]


def test_heatmap_stands_on_its_own_and_knows_both_themes():
    page = prompt_heatmap_html(["fox"], [1.0])
    assert page.startswith("<style>")
    assert level_color(20, "light") in page
    assert "prefers-color-scheme:dark" in page
    assert level_color(20, "dark") in page


def test_heatmap_escapes_everything():
    words = [
        "<script>alert(1)</script>",
        '"onmouseover="x',
        "</bdi></style>",
        "a\x00\x1b\u202eb",
        "&",
    ]
    read = Reader(prompt_heatmap_html(words, [1.0] * 5, style=False))
    assert read.tags == ["bdi"] + ["span"] * 5
    assert all(set(a) <= {"class", "title", "dir"} for a in read.attributes)
    assert read.text == " ".join([*words[:3], "a␀␛<U+202E>b", "&"])


def test_pairs_must_match():
    with pytest.raises(ValueError, match="2 words but 1 significances"):
        prompt_heatmap_html(["a", "b"], [1.0])
    with pytest.raises(ValueError, match="1 words but 2 significances"):
        prompt_heatmap_png(["a"], [1.0, 2.0])


@THEME
def test_heatmap_png_paints_the_levels(theme):
    image = prompt_heatmap_png(["red", "fox"], [0.5, 1.0], theme=theme)
    colors = {"#" + bytes(c).hex() for _, c in image.getcolors(1 << 20)}
    assert {level_color(0, theme), level_color(10, theme), level_color(20, theme)} <= colors
    assert THEMES[theme]["ink"] in colors


def test_heatmap_png_wraps_and_keeps_its_width():
    short = prompt_heatmap_png(["fox"], [1.0], width=300)
    long = prompt_heatmap_png(["fox"] * 60, [1.0] * 60, width=300)
    endless = prompt_heatmap_png(["x" * 400], [1.0], width=300)
    assert short.width == long.width == endless.width == 300
    assert long.height > 5 * short.height
    right = np.asarray(endless)[:, -10:]
    assert (right == 255).all(), "the word runs over the edge"
    with pytest.raises(ValueError, match="at least four letters"):
        prompt_heatmap_png(["fox"], [1.0], width=20)


def test_heatmap_png_draws_every_script():
    def ink(word: str) -> np.ndarray:
        return np.asarray(prompt_heatmap_png([word], [0.0], width=300))

    words = ["лиса", "ثعلب", "狐", "🦊", "\U0001fbff", "", "a\u0301"]
    drawn = [ink(word) for word in words]
    assert [bool((d < 128).any()) for d in drawn] == [bool(word) for word in words]
    assert not np.array_equal(ink("\u31ef"), ink("\u31f0")), "unknown letters look alike"


def test_overlay_glows_where_the_map_is_high():
    image = Image.new("RGB", (64, 48), "#808080")
    values = np.zeros((6, 8))
    values[1, 6] = 1.0
    over = np.asarray(overlay_map(image, values)).astype(int)
    assert over.shape == (48, 64, 3)
    spot, far = over[12, 52], over[40, 8]
    grey = np.asarray(overlay_map(image, values, strength=0.0))
    assert len(np.unique(grey)) == 1
    assert (far == grey[0, 0]).all(), "grey where nothing is"
    assert spot.sum() > far.sum() + 100
    assert np.ptp(spot) > 20, "coloured where something is"


def test_overlay_accepts_flat_maps_and_refuses_others():
    image = Image.new("RGBA", (8, 8), "red")
    flat = overlay_map(image, np.full((2, 2), 3.0))
    assert flat.mode == "RGB"
    assert len(np.unique(np.asarray(flat))) == 1
    with pytest.raises(ValueError, match=r"\[height width\].*\(1, 2, 2\)"):
        overlay_map(image, np.zeros((1, 2, 2)))


def test_words_that_were_not_measured_say_so_and_have_no_colour():
    page = prompt_heatmap_html(["a", "b", "c", "d"], [1.0, None, math.nan, -2.0], style=False)
    read = Reader(page)
    assert [a["class"] for a in read.attributes[1:]] == [f"w{LEVELS}", "w0", "w0", "w0"]
    titles = [a["title"] for a in read.attributes[1:]]
    assert titles == ["a: 1", "b: not measured", "c: not measured", "d: -2"]


def test_what_striking_a_word_does_stands_beside_it_as_data():
    said = 'without "b" <i>less</i>'
    read = Reader(prompt_heatmap_html(["a", "b"], [1.0, 0.5], style=False, says={1: said}))
    assert read.tags == ["bdi", "span", "span"]
    assert "data-says" not in read.attributes[1]
    assert (read.attributes[2]["data-word"], read.attributes[2]["data-says"]) == ("1", said)
