"""The curve over epochs as SVG: its parts, and points where their numbers say."""

import re
from xml.etree import ElementTree

import pytest
from some_audit import make_epochs, rate
from unmemorize.audit.lora.page_images import epoch_figure

POINTS = make_epochs(8, 4, "")  # 0, 0, 2 and 4 of 8


def parts(svg: str) -> dict[str, ElementTree.Element]:
    return {e.get("id"): e for e in ElementTree.fromstring(svg).iter() if e.get("id")}


def test_has_points_controls_and_the_epoch_to_publish():
    svg = epoch_figure(POINTS, rate(0, 40), 1)
    assert {"reproduced", "controls", "best"} <= set(parts(svg))
    assert "epoch 2" in svg
    assert svg == epoch_figure(POINTS, rate(0, 40), 1)
    without = epoch_figure(POINTS, rate(0, 40), None)
    assert "best" not in parts(without)


def test_points_lie_where_their_shares_say():
    line = parts(epoch_figure(POINTS, rate(0, 40), None))["reproduced"].find(".//*[@d]")
    places = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", line.get("d"))]
    across, down = zip(*places, strict=True)
    assert len(places) == len(POINTS)
    assert [x - across[0] for x in across] == pytest.approx(
        [n * (across[-1] - across[0]) / 3 for n in range(4)], abs=0.01
    )
    heights = [down[0] - y for y in down]  # SVG counts downwards
    assert heights[:2] == [0, 0]
    assert 0 < heights[2] == pytest.approx(heights[3] / 2, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_one_epoch_and_no_controls_can_be_drawn(theme):
    assert parts(epoch_figure(POINTS[:1], rate(0, 1), 0, theme=theme, width=3.6))["best"]
