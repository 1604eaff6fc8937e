"""What a report and a terminal say: numbers, and sentences that agree with them."""

import dataclasses
import logging

import pytest
from fake_result import make_result, make_summary
from unmemorize.audit.common import wording
from unmemorize.audit.model import report
from unmemorize.audit.model.inputs import Inputs
from unmemorize.audit.model.result import rate, summarize
from unmemorize.cli.audit import audit_verdict
from unmemorize.shared.files.prompts import Prompt, PromptSet, clean


def test_headline_follows_the_counts_and_chance():
    def headline(hits: int, chance: float = 1e-9, near: int = 0, copied: int = 0) -> str:
        return report.headline({"hits": hits, "n": 40}, chance, near, copied)

    assert headline(0, 1.0) == "None of 40 prompts scored above the threshold"
    assert headline(1) == "1 of 40 prompts looks memorized"
    assert headline(6) == "6 of 40 prompts look memorized"
    assert headline(6, near=1) == "5 of 40 prompts look memorized, 1 more is near a memorized one"
    assert headline(3, near=2) == "1 of 40 prompts looks memorized, 2 more are near a memorized one"
    assert headline(1, 0.33).endswith("scored above the threshold, as chance alone might bring")
    for hits, chance in ((0, 1.0), (1, 0.33)):  # a copy outweighs any count
        assert headline(hits, chance, copied=1) == (
            "1 of 40 prompts came back as a copy of a training image"
        )
    assert headline(6, copied=5) == headline(6)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.0, "0"), (1.0, "100"), (0.084, "8.4"), (0.5, "50"), (0.01, "1"), (0.996, "99.6"),
     (0.0001, "0.01"), (0.99995, "over 99.9"), (0.0996, "10")],
)  # fmt: skip
def test_percent(rate, text):
    assert wording.percent(rate).split("\u00a0")[0].removesuffix(".0") == text


def test_numbers():
    shown = [wording.number(v) for v in (3.14159, 12.0, 0.00662, 1234.5678, 2e-7, float("nan"))]
    assert shown == ["3.14", "12", "0.00662", "1235", "2.0e-7", "\u2013"]
    assert wording.chance(1e-12) == "below 0.0001"
    assert wording.between(0.012, 0.09) == "1.2 to 9\u00a0%"


def test_one_prompt_is_said_in_the_singular():
    assert report.headline({"hits": 0, "n": 1}, 1.0).startswith("None of 1 prompt scored")
    assert report.headline({"hits": 1, "n": 1}, 0.0) == "1 of 1 prompt looks memorized"


def test_a_copy_is_a_finding_whatever_the_prompts_score(tmp_path):
    clean = make_result(tmp_path, hits=0)
    drawn = next(entry for entry in clean.entries if entry.images)
    first = drawn.images[0]
    copy = dataclasses.replace(first, nearest=dataclasses.replace(first.nearest, copied=True))
    entries = [dataclasses.replace(e, images=(copy,)) if e is drawn else e for e in clean.entries]
    summary = make_summary(clean.config, clean.model, clean.calibration, entries, "")
    copied = dataclasses.replace(clean, entries=tuple(entries), summary=summary)
    assert copied.found
    assert not clean.found
    assert "1 prompt came back as a copy" in audit_verdict(copied)
    assert report.lead(copied) != report.lead(clean)
    assert "1 of 40 prompts came back as a copy" in report.render_report(copied, tmp_path)


def told(tmp_path, prompts: int, flagged: int, copies: tuple[int, int]) -> str:
    """Return what page and terminal say when so many are flagged and so many pictures copies."""
    names = [f"prompt {i}" for i in range(prompts)]
    result = make_result(tmp_path, names, hits=flagged, demo=False)
    similarity = {"method": "pixels", "training_images": 9, "threshold": 0.3,
                  "copies": rate(*copies)}  # fmt: skip
    summary = result.summary | {"similarity": similarity, "chance_p_value": 0.0}
    result = dataclasses.replace(result, summary=summary)
    return " ".join([*report.lead(result), audit_verdict(result)])


def test_verdicts_agree_with_their_numbers(tmp_path):
    one = told(tmp_path, 40, 1, (1, 1))
    for sentence in (
        "It steers the model",
        "Of 1 image made from flagged prompts and compared with the training images, 1 came "
        "out as a copy.",
        "1 of 40 prompts is above the threshold",
        "1 of 1 image generated for it is a copy of a training image.",
    ):
        assert sentence in one
    many = told(tmp_path, 40, 2, (0, 3))
    for sentence in (
        "They steer the model",
        "Of 3 images made from flagged prompts and compared with the training images, 0 came "
        "out as copies.",
        "2 of 40 prompts are above the threshold",
        "0 of 3 images generated for them are copies of a training image.",
    ):
        assert sentence in many


def test_nothing_found_agrees_with_its_numbers(tmp_path):
    one, many = told(tmp_path, 1, 0, (0, 1)), told(tmp_path, 2, 0, (0, 1))
    assert "only this prompt was looked at" in one
    assert "0 of 1 prompt is above" in one
    assert "only these prompts were looked at" in many
    assert "0 of 2 prompts are above" in many


@pytest.mark.parametrize(
    ("near", "hits", "clause"),
    [
        (0, 3, ""), (1, 1, ", near a memorized one"), (1, 3, ", 1 of them near a memorized one"),
        (2, 3, ", 2 of them near a memorized one"),
    ],
)  # fmt: skip
def test_near_ones_are_counted_among_the_flagged(near, hits, clause):
    assert wording.near_ones(near, hits) == clause


def test_the_terminal_says_the_rate_of_near_ones(tmp_path):
    names, groups = [f"prompt {i}" for i in range(40)], ["verbatim"] * 2 + ["held_out"] * 38
    said = audit_verdict(make_result(tmp_path, names, hits=4, near=1, groups=groups))
    for sentence in (
        "4 of 40 prompts are above the threshold",
        "1 of them is near a memorized one (2.5% of all, 95 % interval 0.1% to 13.2%).",
        "verbatim: 2 of 2\nheld_out: 2 of 38, 1 of them near a memorized one\n",
    ):
        assert sentence in said
    assert "near" not in audit_verdict(make_result(tmp_path, names, hits=4, demo=False))


@pytest.mark.parametrize(
    ("n", "sentences"),
    [
        (0, []),
        (1, ["1 empty prompt was left out.",
             "1 repeated prompt was merged with its first.",
             "1 control prompt is audited as well: the threshold may be too high.",
             "Prompt 0 is too long for the text encoder: its last word is not read, from "
             "'end' on."]),
        (2, ["2 empty prompts were left out.",
             "2 repeated prompts were merged with their first.",
             "2 control prompts are audited as well: the threshold may be too high.",
             "Prompt 0 is too long for the text encoder: its last 2 words are not read, from "
             "'end end' on."]),
    ],
)  # fmt: skip
def test_warnings_agree_with_their_numbers(n, sentences, tmp_path):
    result = make_result(tmp_path, hits=0)
    first = dataclasses.replace(result.entries[0], cut=" ".join(["end"] * n))
    entries = (first, *result.entries[1:])
    texts = tuple(entry.prompt for entry in entries)
    inputs = Inputs(
        prompts=PromptSet(prompts=texts, sources=(("a.txt:1",),) * len(texts),
                          images=((),) * len(texts), read=len(texts) + 2 * n, empty=n),
        groups=(None,) * len(texts), controls_name="mine", controls=("another", *texts[:n]),
    )  # fmt: skip
    summary = summarize(
        result.config, inputs, result.model, result.calibration, entries, caveats=[],
        similarity=None, timings={},
    )  # fmt: skip
    assert summary["warnings"] == sentences


@pytest.mark.parametrize(
    ("texts", "sentences"),
    [
        (["a", "b"], []),
        ([""], ["1 of 1 prompt is empty and left out."]),
        (["a", ""], ["1 of 2 prompts is empty and left out."]),
        (["a", "", ""], ["2 of 3 prompts are empty and left out."]),
        (["a", "a"], ["1 prompt repeats an earlier one and is merged with it."]),
        (["a", "a", "a"], ["2 prompts repeat an earlier one and are merged with it."]),
    ],
)
def test_what_is_dropped_is_counted_in_words_that_fit(texts, sentences, caplog):
    with caplog.at_level(logging.WARNING):
        clean(Prompt(text=text, source="a.txt:1") for text in texts)
    assert caplog.messages == sentences
