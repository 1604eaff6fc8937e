"""The chart of a run: what is flagged is drawn so, and every kind of run can be drawn."""

import numpy as np
import pytest
from runs_to_watch import calibration, calibration_of_images, run
from unmemorize.shared.drawing.step_chart import LISTED, WIDTH, draw_note, draw_step_chart
from unmemorize.shared.drawing.theme import THEMES
from unmemorize.shared.mitigation.gate import GuardedImage
from unmemorize.shared.sampling.watched_runs import judge

HIGH, LOW = 9.0, 1.2


def pixels(image, color: str) -> int:
    """Return how many pixels have exactly this colour."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.asarray(image) == wanted).all(2).sum())


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_only_runs_above_the_threshold_are_drawn_in_the_colour_of_the_flagged(theme):
    flagged = THEMES[theme]["flagged"]
    drawn = {
        score: draw_step_chart(r, judge(r, calibration()), theme=theme)
        for score in (HIGH, LOW)
        for r in [run([score] * 2)]
    }
    assert drawn[HIGH].width == WIDTH
    assert pixels(drawn[HIGH], flagged) > 1000
    assert pixels(drawn[LOW], flagged) == 0


@pytest.mark.parametrize("images", [1, LISTED, LISTED + 2])
@pytest.mark.parametrize("levels", [1, 2, 30, 1000])
@pytest.mark.parametrize("calibrated", [True, False])
def test_every_kind_of_run_can_be_drawn(images, levels, calibrated):
    r = run([2.0 + i for i in range(images)], levels=levels)
    image = draw_step_chart(r, judge(r, calibration() if calibrated else None))
    assert image.mode == "RGB"
    few = draw_step_chart(run([2.0]), judge(run([2.0])))
    assert (image.height > few.height) == (images > 1)


@pytest.mark.parametrize("score", [0.0, 1e-6, 1e5])
def test_scores_of_any_size_can_be_drawn(score):
    r = run([score])
    assert draw_step_chart(r, judge(r)).width == WIDTH


def test_residuals_are_dots_beside_the_lines_of_magnitudes():
    r = run([2.0, 9.0])
    magnitudes, residuals = (judge(r, each()) for each in (calibration, calibration_of_images))
    plain, beside = draw_step_chart(r, magnitudes), draw_step_chart(r, residuals)
    assert beside.height > plain.height  # a line that says which is which
    assert pixels(beside, THEMES["dark"]["flagged"]) > 1000


def test_a_note_holds_its_text():
    short, long = (draw_note("not measurable " * n) for n in (1, 40))
    assert long.height > short.height
    assert pixels(long, THEMES["dark"]["ink"]) > 2 * pixels(short, THEMES["dark"]["ink"]) > 0


def test_the_score_before_a_guard_replaced_the_noise_is_a_ring():
    image = GuardedImage(
        prompt=None, fired=True, threshold=2.0, score_before=5.0, noise_before=6.0,
        noise_after=1.5, method="initial_noise",
    )  # fmt: skip
    plain, guarded = run([9.0]), run([9.0], guarded=(image,))
    without, ringed = (draw_step_chart(r, judge(r, calibration())) for r in (plain, guarded))
    assert ringed.height > without.height  # a line that says what rings are
    plots = [np.asarray(image.crop((0, 0, WIDTH, 480))) for image in (without, ringed)]
    assert 100 < (plots[0] != plots[1]).any(2).sum() < 1000  # a ring, and nothing else
