"""Charts of scores: everything they promise stands where its numbers say, read from the pixels."""

import math

import numpy as np
import pytest
from scipy import ndimage
from unmemorize.shared.drawing.chart import Axis, Chart, round_ticks
from unmemorize.shared.drawing.score_charts import (
    score_distribution,
    score_traces,
    scores_axis,
    steps_axis,
)
from unmemorize.shared.drawing.theme import THEMES, mixed

OPACITY = 0.85  # of dots


def pixels(image, color: str) -> np.ndarray:
    """Return which pixels have exactly this colour, [height width]."""
    return (np.asarray(image) == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(2)


def marks(image, color: str) -> list[tuple[float, float]]:
    """Return the middles of all connected shapes of a colour, pixels from left and bottom."""
    labels, count = ndimage.label(pixels(image, color))
    middles = ndimage.center_of_mass(labels > 0, labels, range(1, count + 1))
    sizes = ndimage.sum(labels > 0, labels, range(1, count + 1))
    return sorted(
        (x, image.height - y) for (y, x), size in zip(middles, sizes, strict=True) if size > 9
    )


def dots(image, role: str, theme: str = "light") -> list[tuple[float, float]]:
    return marks(image, mixed(theme, role, OPACITY))


def line_x(image) -> float:
    """Return where the dashed line stands: the column with most of the ink."""
    columns = pixels(image, THEMES["light"]["ink"]).sum(0)
    return float(np.flatnonzero(columns == columns.max()).mean()) if columns.max() > 99 else 0.0


def distribution(**change):
    scores, controls = [1.0, 2.0, 2.0, 6.0, 7.0], [1.0, 1.5, 2.0, 3.0]
    call = {"scores": scores, "flagged": [s > 5 for s in scores], "control_scores": controls,
            "threshold": 5.0} | change  # fmt: skip
    return score_distribution(**call)


def test_distribution_has_a_dot_per_prompt_and_the_threshold_between():
    image = distribution()
    shown = {role: dots(image, role) for role in ("flagged", "other", "control")}
    assert [len(places) for places in shown.values()] == [2, 3, 4]
    x, others, flagged = line_x(image), shown["other"], shown["flagged"]
    assert max(x for x, _ in others) < x < min(x for x, _ in flagged)
    # The axis is linear: 5 lies as far between 1 and 6 as its line between their dots.
    first, last = others[0][0], flagged[0][0]
    assert (x - first) / (last - first) == pytest.approx((5 - 1) / (6 - 1), abs=2e-3)
    assert max(y for _, y in shown["control"]) < min(y for _, y in others)


def test_distribution_moves_the_threshold():
    assert 0 < line_x(distribution(threshold=3.5)) < line_x(distribution())
    assert line_x(distribution(threshold=None)) == 0


def test_distribution_stacks_equal_scores():
    (_, low), (_, middle), (_, high) = dots(distribution(), "other")
    assert low in (middle, high)
    assert abs(middle - high) > 10


def test_distribution_spreads_a_wide_range_by_powers_of_ten():
    image = distribution(scores=[1.0, 10.0, 100.0], flagged=[False] * 3, control_scores=[],
                         threshold=None)  # fmt: skip
    (first, _), (second, _), (third, _) = dots(image, "other")
    assert second - first == pytest.approx(third - second, abs=1)


def test_distribution_of_many_prompts_can_be_drawn():
    many = np.linspace(1, 9, 20_000)
    assert dots(distribution(scores=many, flagged=many > 5), "flagged")


def test_distribution_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="5 `scores` but 1 `flagged`"):
        distribution(flagged=[True])
    with pytest.raises(ValueError, match="no finite score"):
        distribution(scores=[math.nan], flagged=[False], control_scores=[], threshold=None)
    assert len(dots(distribution(scores=[math.nan, 1.0], flagged=[False, False]), "other")) == 1


def test_traces_have_a_line_a_seed_their_mean_and_the_threshold():
    image = score_traces([[1.0, 2.0], [3.0, math.nan]], threshold=1.5)
    crossed = score_traces([[1.0, 3.0], [3.0, 1.0]], threshold=1.5)
    mean = pixels(image, THEMES["light"]["flagged"])
    assert np.array_equal(mean, pixels(crossed, THEMES["light"]["flagged"])), "2 at both steps"
    assert np.ptp(np.flatnonzero(mean.any(1))) < 20, "a mean that stays the same is level"
    seeds = [pixels(chart, mixed("light", "other", 0.5)).sum() for chart in (image, crossed)]
    assert 0 < 1.5 * seeds[0] < seeds[1]
    threshold = pixels(image, THEMES["light"]["ink"])
    assert threshold.sum(1).max() > 600, "the threshold is a line"
    with pytest.raises(ValueError, match="seed step"):
        score_traces([1.0, 2.0])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_charts_are_reproducible_and_themed(theme):
    other = "dark" if theme == "light" else "light"
    for draw in (distribution, lambda theme: score_traces([[1.0, 2.0]], theme=theme)):
        image = draw(theme=theme)
        assert image.tobytes() == draw(theme=theme).tobytes()
        colors = {"#" + bytes(color).hex() for _, color in image.getcolors(1 << 20)}
        assert {THEMES[theme]["page"], THEMES[theme]["muted"]} <= colors
        flagged = {role: {THEMES[role]["flagged"], mixed(role, "flagged", OPACITY)}
                   for role in (theme, other)}  # fmt: skip
        assert flagged[theme] & colors
        assert not flagged[other] & colors


@pytest.mark.parametrize("highest", [0.0, 1e-6, 0.3, 7.0, 1e5])
def test_axes_of_scores_begin_at_zero_and_end_above_the_highest(highest):
    axis = scores_axis(highest)
    assert axis.ticks[0] == (0, "0")
    assert highest < axis.high == pytest.approx(axis.ticks[-1][0])
    assert 3 <= len(axis.ticks) <= 7


@pytest.mark.parametrize("levels", [1, 2, 7, 20, 1000])
def test_axes_of_steps_mark_the_first_and_whole_numbers(levels):
    values = [value for value, _ in steps_axis(levels).ticks]
    assert values[0] == 1
    assert all(value == int(value) and value <= levels for value in values)
    assert values == sorted(set(values))
    assert len(values) <= 10


def test_ticks_are_round():
    assert [label for _, label in round_ticks(0.13, 0.94, 5)] == ["0.2", "0.4", "0.6", "0.8"]
    assert [label for _, label in round_ticks(3, 60, 5, log=True)] == ["5", "10", "20", "50"]
    assert [value for value, _ in round_ticks(1, 4, 10, whole=True)] == [1, 2, 3, 4]


def test_labels_that_would_touch_are_left_out_and_lines_break_at_gaps():
    ticks = [(float(i), f"label {i}") for i in range(50)]
    x = Axis(label="", low=0, high=50, ticks=ticks)
    y = Axis(label="", low=0, high=1, ticks=[(0, "0")])
    chart = Chart(x, y, width=400, height=200, size=20, theme="light")
    chart.line([(0, 0.5), (10, 0.5), (20, math.nan), (30, 0.5), (40, 0.5)], "flagged")
    image = chart.image()
    assert len(marks(image, THEMES["light"]["flagged"])) == 2
    below = np.asarray(image.convert("L"))[148:170]
    gaps = np.diff(np.flatnonzero((below < 200).any(0)))
    assert gaps.max() > 8, "labels run into each other"
