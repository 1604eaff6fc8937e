"""The curve over epochs: its parts, and points where their numbers say, read from the pixels."""

import numpy as np
import pytest
from scipy import ndimage
from some_audit import make_epochs, rate
from unmemorize.audit.lora.page_images import epoch_chart
from unmemorize.shared.drawing.theme import THEMES, mixed

POINTS = make_epochs(8, 4, "")  # 0, 0, 2 and 4 of 8


def pixels(image, color: str) -> np.ndarray:
    """Return which pixels have exactly this colour, [height width]."""
    return (np.asarray(image) == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(2)


def dashed(image) -> int:
    """Return how many pixels the tallest upright line of ink has."""
    return int(pixels(image, THEMES["light"]["ink"]).sum(0).max())


def test_has_points_controls_and_the_epoch_to_publish():
    image = epoch_chart(POINTS, rate(0, 40), 1)
    assert pixels(image, THEMES["light"]["flagged"]).sum() > 1000
    assert pixels(image, mixed("light", "control", 0.25)).any(0).sum() > 0.8 * image.width
    assert dashed(image) > image.height / 5
    assert image.tobytes() == epoch_chart(POINTS, rate(0, 40), 1).tobytes()
    assert dashed(epoch_chart(POINTS, rate(0, 40), None)) == 0


def test_points_lie_where_their_shares_say():
    drawn = pixels(epoch_chart(POINTS, rate(0, 40), None), THEMES["light"]["flagged"])
    # Only the diamonds are wider than any line: what is left after thinning is their middles.
    labels, count = ndimage.label(ndimage.binary_erosion(drawn, iterations=4))
    assert count == len(POINTS)
    middles = ndimage.center_of_mass(labels > 0, labels, range(1, count + 1))
    down, across = zip(*sorted(middles, key=lambda place: place[1]), strict=True)
    assert [x - across[0] for x in across] == pytest.approx(
        [n * (across[-1] - across[0]) / 3 for n in range(4)], abs=1
    )
    heights = [down[0] - y for y in down]  # pixels are counted downwards
    assert heights[:2] == pytest.approx([0, 0], abs=1)
    assert 0 < heights[2] == pytest.approx(heights[3] / 2, abs=1)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_one_epoch_and_no_controls_can_be_drawn(theme):
    image = epoch_chart(POINTS[:1], rate(0, 1), 0, theme=theme, width=720)
    assert pixels(image, THEMES[theme]["ink"]).any()
