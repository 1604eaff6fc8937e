import json

import pytest
from unmemorize.shared.drawing.score_changes import LISTED, WIDTH, LoraScores, draw_score_changes
from unmemorize.shared.drawing.typeset import fitting


def scores(captions: int = 3, controls: int = 2) -> LoraScores:
    total = captions + controls
    prompts = [f"prompt {number}" for number in range(total)]
    return LoraScores.of(
        prompts, [1.0] * total, [1.0 + number for number in range(total)], captions
    )


def test_captions_are_ranked_and_controls_stay_apart():
    found = scores()
    assert [change.prompt for change in found.captions] == ["prompt 2", "prompt 1", "prompt 0"]
    assert [change.prompt for change in found.controls] == ["prompt 3", "prompt 4"]
    assert found.mean_increase == pytest.approx(1)
    assert found.mean_control_increase == pytest.approx(3.5)
    assert "2 ordinary prompts: +3.5 (mean), +4 at most; 0 of 3 captions lie above" in str(found)
    assert json.loads(json.dumps(found.as_json()))["captions"][0]["increase"] == 2


def test_without_controls_nothing_is_said_of_them():
    found = scores(controls=0)
    assert found.mean_control_increase is None
    assert "ordinary" not in str(found)


def test_the_table_shows_so_many_captions_and_no_more():
    drawn = {number: draw_score_changes(scores(number)).height for number in (1, 2, LISTED)}
    assert drawn[1] < drawn[2] < drawn[LISTED]
    longer = draw_score_changes(scores(LISTED + 9))
    assert longer.size == (WIDTH, drawn[LISTED] + drawn[2] - drawn[1])  # one line for the others


def test_any_text_and_a_fall_of_the_score_can_be_drawn():
    found = LoraScores.of(["\u202e\n🎉 " * 50, ""], [5.0, 1.0], [1.0, 1.0], 2)
    assert found.mean_increase == pytest.approx(-2)
    assert draw_score_changes(found, theme="light").getpixel((WIDTH - 2, 2)) == (255, 255, 255)


def test_text_is_cut_where_its_room_ends():
    text = "a caption of some length"
    assert fitting(text, 20, 1000) == text
    cut = fitting(text, 20, 100)
    assert cut.endswith("…")
    assert text.startswith(cut[:-1])
    assert 0 < len(fitting(text, 20, 60)) < len(cut) < len(text)
