"""What an explanation says: by leaving words out, and by gradients that choose among many."""

import math

import pytest
import torch
from toy import DifferentiableToy, ToyDenoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect
from unmemorize.shared.words.explanation import CONFIRMED, LEFT_OUT, METHODS, Explanation, explain
from unmemorize.shared.words.gradients import input_gradient
from unmemorize.shared.words.leaving_out import Occlusion

CONFIG = DetectionConfig(seeds=(0, 2), steps=1, schedule_steps=5)
LONG = " ".join(f"w{number:02}" for number in range(30))


@pytest.fixture(scope="module")
def toy() -> ToyDenoiser:
    return ToyDenoiser()


def test_leaving_out_every_word_is_the_default(toy):
    prompt = "old red lighthouse near snow"
    found = explain(toy, prompt, CONFIG)
    assert found.method == "leave_out" == METHODS[0]
    assert found.words == tuple(prompt.split())
    assert sorted(o.index for o in found.occlusions) == list(range(5))
    for o in found.occlusions:
        assert found.significance[o.index] == o.change
    assert [o.index for o in found.occlusions] == list(found.ranked)
    falling = [o for o in found.occlusions if o.fall >= 0.1 * o.score_before]
    assert len(falling) < sum(o.fall > 0 for o in found.occlusions)
    assert found.suggestions == tuple(map(str, falling[:3]))
    assert found.notes == found.token_significance == ()


def test_one_seed_is_the_default(toy):
    found = explain(toy, "red boat")
    one = explain(toy, "red boat", DetectionConfig(seeds=(0,)))
    assert found.significance == one.significance


def test_only_words_that_clearly_lower_the_score_are_suggested():
    """By a tenth: another starting noise may undo less."""
    base = {"index": 0, "prompt": "", "score_before": 2.0, "change": 1.0}
    falls = Occlusion(word="fox", score_after=1.23456, **base)
    rises = Occlusion(word="cat", score_after=2.5, **base)
    hardly = Occlusion(word="hen", score_after=1.81, **base)
    explanation = Explanation(
        prompt="fox cat", words=("fox", "cat"), significance=(1.0, 1.0), tokens=(),
        token_significance=(), occlusions=(hardly, falls, rises), difference_map=torch.zeros(1, 1),
    )  # fmt: skip
    assert explanation.suggestions == ("without “fox” the magnitude falls from 2 to 1.23",)


def test_a_single_word_and_none(toy):
    one = explain(toy, "lighthouse", CONFIG)
    assert [o.prompt for o in one.occlusions] == [""]
    assert one.occlusions[0].score_after < 1e-4 * one.occlusions[0].score_before
    assert one.suggestions[0].startswith("without “lighthouse” the magnitude falls from")
    for prompt in ("", "  \n"):
        none = explain(toy, prompt, CONFIG)
        assert none.words == none.significance == none.occlusions == none.suggestions == ()


def test_words_that_were_cut_are_told_and_not_left_out(toy):
    found = explain(toy, " ".join(["snow"] * 9 + ["rain"] * 31), CONFIG)
    assert len(found.words) == len(found.significance) == 40
    assert sorted(o.index for o in found.occlusions) == list(range(10))
    assert set(found.significance[10:]) == {0.0}
    (note,) = found.notes
    assert "does not read 30 of 40 words, from “rain” on" in note


def test_of_a_long_prompt_those_are_left_out_that_the_input_gradient_ranks_first():
    network = DifferentiableToy(positions=40)
    found = explain(network, LONG, CONFIG)
    gradient = input_gradient(network, LONG, CONFIG).of_words(30)
    first = sorted(range(30), key=lambda i: -gradient[i])[:LEFT_OUT]
    assert sorted(o.index for o in found.occlusions) == sorted(first)
    assert {i for i in range(30) if math.isnan(found.significance[i])} == {*range(30)} - {*first}
    assert set(found.ranked) <= set(first)
    (note,) = found.notes
    assert note.startswith("Of 30 words, 24 were left out")
    few = explain(network, LONG, CONFIG, occlude=2)
    assert sorted(o.index for o in few.occlusions) == sorted(first[:2])


def test_a_host_that_cannot_choose_leaves_all_words_out_and_says_so():
    found = explain(ToyDenoiser(positions=40), LONG, CONFIG)
    assert len(found.occlusions) == 30
    (note,) = found.notes
    assert note.startswith("All 30 words were left out: this host cannot differentiate")


@pytest.mark.parametrize("method", ["input_gradient", "encoder_gradient"])
def test_gradients_are_confirmed_by_leaving_their_first_words_out(method):
    network = DifferentiableToy()
    found = explain(network, "old red lighthouse near snow", CONFIG, method=method)
    assert found.method == method
    assert min(found.significance) > 0
    assert {o.index for o in found.occlusions} == set(found.ranked[:CONFIRMED])
    assert len(found.tokens) == len(found.token_significance) > 0
    none = explain(network, "red boat", CONFIG, method=method, occlude=0)
    assert none.occlusions == ()


def test_what_cannot_be_done_is_refused(toy):
    with pytest.raises(ValueError, match="cannot differentiate through its text encoder"):
        explain(toy, "red boat", CONFIG, method="input_gradient")
    # The type is checked in tests alone.
    with pytest.raises((ValueError, TypeError), match=r"leave_out.*input_gradient.*encoder_gradi"):
        explain(toy, "red boat", CONFIG, method="paper")
    with pytest.raises(ValueError, match="`occlude` must be at least 1 with leave_out, got 0"):
        explain(toy, "red boat", CONFIG, occlude=0)


def test_difference_map_belongs_to_the_first_seed_and_step(toy):
    norm = detect(toy, ["red boat"], CONFIG).traces[0, 0, 0].item()
    for method in ("leave_out", "encoder_gradient"):
        heat = explain(toy, "red boat", CONFIG, method=method).difference_map
        assert heat.shape == (8, 8)
        assert heat.double().expm1().sum().sqrt().item() == pytest.approx(norm, rel=1e-4)


def test_demo_model_is_explained_as_it_is_detected():
    from unmemorize.demo import MODEL
    from unmemorize.shared.models.load import load_denoiser

    denoiser, prompt = load_denoiser(MODEL, device="cpu"), "strawberry, red fruit"
    config = DetectionConfig(seeds=(0, 1))
    score = detect(denoiser, [prompt], config).scores.item()
    found = explain(denoiser, prompt, config)
    assert found.words == ("strawberry,", "red", "fruit")
    assert {o.index for o in found.occlusions} == {0, 1, 2}
    assert found.difference_map.shape == (16, 16)
    for o in found.occlusions:
        after = detect(denoiser, [o.prompt], config).scores.item()
        assert (o.score_before, o.score_after) == pytest.approx((score, after), rel=1e-5)
    for method in ("input_gradient", "encoder_gradient"):
        assert min(explain(denoiser, prompt, config, method=method).significance) > 0
