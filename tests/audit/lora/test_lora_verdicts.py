"""What is said of images and of the whole LoRA, and what is refused."""

from itertools import product

import pytest
import torch
from unmemorize.audit.lora.result import PositiveControl, PromptScore, Rate, Thresholds
from unmemorize.audit.lora.rule import COPY, NEAR, NONE, Marked
from unmemorize.audit.lora.verdicts import (
    LEVEL,
    Evidence,
    fisher,
    judge_images,
    summarize,
    thresholds,
)
from unmemorize.audit.lora.words import doubt_by_scores

WORKS = PositiveControl(found=Rate.of(7, 8), works=True, detail="Seven were found.")
FAILS = PositiveControl(found=Rate.of(1, 8), works=False, detail="One was found.")
LIMITS = Thresholds(method="By hand.", controls=40, enough=True)
FEW = Thresholds(method="3 controls cannot carry a verdict.", controls=3, enough=False)
ASKED = "captions (40 images)"


def evidence(on, off, *, held_out=(), pixels=None) -> Evidence:
    """Return evidence of one generation an image, on and off, with marks on the diagonal.

    `pixels` tells for which images the mark is that of pixels alone.
    """
    count = len(on) + len(held_out)
    marks = torch.cat([torch.diag(torch.tensor([*on, *held_out])), torch.diag(torch.tensor(off))])
    marks = marks.float()
    own = torch.cat([torch.eye(count), torch.eye(count)]).bool()
    alike = torch.stack([marks > NONE, marks > NONE])
    for image in pixels or ():
        alike[1, :, image] = False
    marked = Marked(marks=marks, own=own, alike=alike, closeness=2.5 - marks,
                    controls=(40,) * count)  # fmt: skip
    return Evidence(matrix=0.2 + 0.3 * marks, marked=marked, on=range(count),
                    off=range(count, 2 * count), trained=len(on),
                    held_out=range(len(on), count))  # fmt: skip


def verdicts(found: Evidence, enough: bool = True):
    return judge_images(found, torch.ones(found.matrix.shape[1]), enough=enough)


def headline(found: Evidence, limits=LIMITS, instrument=WORKS, doubt=""):
    judged = verdicts(found, limits.enough)
    return summarize(judged, found, limits, instrument, asked=ASKED, doubt=doubt)


def test_each_image_is_judged_against_its_own_with_the_lora_off():
    on = [COPY, COPY, NEAR, NEAR, COPY, NONE]
    off = [NONE, COPY, NONE, NEAR, NEAR, NONE]
    found = verdicts(evidence(on, off))
    assert [v.verdict for v in found] == ["verbatim", "base", "near", "none", "verbatim", "none"]
    assert [v.closeness for v in found] == pytest.approx([0.5, 0.5, 1.5, 1.5, 0.5, 2.5])
    assert [v.closeness_off for v in found] == pytest.approx([2.5, 0.5, 2.5, 1.5, 1.5, 2.5])
    assert [v.generation for v in found[:5]] == list(range(5))


def test_the_generation_to_look_at_made_the_verdict():
    """Another may be more similar by SSCD, which is not what the rule goes by."""
    found = evidence([COPY, NONE], [NONE, NONE])
    found.matrix[1, 0] = 0.95
    assert verdicts(found)[0].generation == 0


def test_a_template_is_a_layout_with_other_content():
    found = verdicts(evidence([NEAR, NEAR], [NONE, NONE], pixels=[0]))
    assert [v.verdict for v in found] == ["template", "near"]


@pytest.mark.parametrize("n", [3, 20, 100])
@pytest.mark.parametrize("copies", [1, 3])
def test_one_image_that_came_back_is_a_headline(n, copies):
    said = headline(evidence([COPY] * copies + [NONE] * (n - copies), [NONE] * n))
    assert said.given
    assert said.text.startswith(f"{copies} of {n} training images came back: look at ")
    assert (said.reproduced.count, said.controls.count, said.controls.total) == (copies, 0, n)
    chance = fisher(copies, n, 0, n)
    assert said.p_value == (pytest.approx(chance) if chance < LEVEL else None)


def test_none_states_what_was_asked_and_the_power():
    said = headline(evidence([NONE] * 20, [NONE] * 20))
    assert said.given
    assert said.text.startswith(f"None of 20 training images came back from {ASKED}.")
    assert "finds 7 of 8 images planted" in said.text
    assert "up to 17" in said.text  # Clopper-Pearson of 0 in 20


@pytest.mark.parametrize("pixels", [[0], None])
def test_none_is_never_said_while_an_image_jumps_from_off_to_on(pixels):
    said = headline(evidence([NEAR] + [NONE] * 19, [NONE] * 20, pixels=pixels))
    assert not said.given
    assert "None" not in said.text
    assert "1 of 20 comes nearer" in said.text


def test_none_is_never_said_where_the_words_are_doubted():
    clean = evidence([NONE] * 20, [NONE] * 20)
    said = headline(clean, doubt="3 captions hold none of the words.")
    assert not said.given
    assert said.text.endswith("says nothing: 3 captions hold none of the words.")
    back = headline(evidence([COPY] + [NONE] * 19, [NONE] * 20), doubt="Some doubt.")
    assert back.given  # what came back came back, whatever the words


def test_images_of_the_base_model_are_said_to_be_its_own():
    said = headline(evidence([COPY] * 3 + [NONE] * 7, [COPY] * 2 + [NONE] * 8))
    assert said.text.startswith("1 of 10 training images came back: look at it.")
    assert "2 more are drawn by the base model without the LoRA" in said.text
    none = headline(evidence([COPY] + [NONE] * 9, [COPY] + [NONE] * 9))
    assert none.text.startswith("None of 10")
    assert "1 more is drawn by the base model without the LoRA" in none.text


def test_held_out_images_that_come_back_are_told():
    found = evidence([COPY] * 2 + [NONE] * 8, [NONE] * 15, held_out=[COPY] + [NONE] * 4)
    said = headline(found)
    assert (said.controls.count, said.controls.total) == (1, 15)
    assert "So did 1 of 5 held-out images" in said.text


def test_too_few_controls_and_a_failed_instrument_say_nothing():
    clean = evidence([NONE] * 3, [NONE] * 3)
    for copies in (clean, evidence([COPY] * 3, [NONE] * 3)):
        few = headline(copies, FEW)
        assert not few.given
        assert {v.verdict for v in verdicts(copies, enough=False)} == {"none"}
        failed = headline(copies, instrument=FAILS)
        assert not failed.given
        assert failed.text.startswith("The instrument failed")


def test_thresholds_say_what_is_needed():
    few = thresholds(12, 3, 0)
    assert not few.enough
    assert "12 controls cannot carry a verdict: 20 are needed. Give 8 or more images" in few.method
    assert thresholds(20, 3, 5).enough
    assert "3 training images and 5 held-out images" in thresholds(20, 3, 5).method


def test_words_that_drive_the_model_no_harder_than_any_are_doubted():
    def scored(*rises):
        return [PromptScore(prompt=str(r), asked="caption", source=0, on=0.4 * r, off=0.4)
                for r in rises]  # fmt: skip

    others = {"a": (0.6, 0.4), "b": (0.5, 0.5), "c": (0.1, 0.2)}
    assert doubt_by_scores(scored(1.2, 5.0), others) == ""
    doubt = doubt_by_scores(scored(1.2, 1.6), others)
    assert "at most 1.6 times as hard as without it, of 3 other prompts 1.5" in doubt


def test_fisher_against_all_tables():
    """Slow and plainly right: every way to pick which of all images are copies."""
    for hits, n, control_hits, controls in product(range(4), [3], range(3), [2]):
        total, marked = n + controls, hits + control_hits
        ways = [sum(bits[:n]) for bits in product([0, 1], repeat=total) if sum(bits) == marked]
        expected = sum(way >= hits for way in ways) / len(ways)
        assert fisher(hits, n, control_hits, controls) == pytest.approx(expected)
