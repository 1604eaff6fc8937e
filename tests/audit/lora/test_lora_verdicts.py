"""Thresholds and verdicts: what controls carry, and what is refused."""

from itertools import product

import pytest
import torch
from unmemorize.audit.lora.result import PositiveControl, Rate, Thresholds
from unmemorize.audit.lora.verdicts import (
    NEEDED,
    Evidence,
    fisher,
    judge_images,
    near_threshold,
    summarize,
    thresholds,
)

WORKS = PositiveControl(found=Rate.of(8, 8), works=True, detail="All were found.")
FAILS = PositiveControl(found=Rate.of(1, 8), works=False, detail="One was found.")
LIMITS = Thresholds(verbatim=0.75, near=0.5, method="By hand.", controls=40)


def evidence(on, off, *, held_out=0, layouts=None) -> Evidence:
    """Return evidence of one generation per row, with the LoRA first."""
    matrix = torch.tensor([*on, *off])
    return Evidence(
        matrix=matrix, layouts=torch.zeros_like(matrix) if layouts is None else layouts,
        on=range(len(on)), off=range(len(on), len(matrix)),
        trained=matrix.shape[1] - held_out,
    )  # fmt: skip


def of_best(best: list[float], control: float = 0.3) -> Evidence:
    """Return evidence in which each image's best cosine is given, on the diagonal."""
    on = torch.full((len(best), len(best)), 0.1).diagonal_scatter(torch.tensor(best))
    return evidence(on.tolist(), [[control] * len(best)])


def verdicts(found: Evidence, limits=LIMITS, layout_limit=None):
    return judge_images(found, torch.ones(found.matrix.shape[1]), limits, layout_limit)


def test_each_image_is_judged_by_its_best_generation_with_the_lora():
    on = [[0.9, 0.2, 0.6, 0.2], [0.8, 0.3, 0.5, 0.4]]
    off = [[0.1, 0.95, 0.2, 0.3], [0.2, 0.9, 0.1, 0.2]]
    found = verdicts(evidence(on, off))
    assert [v.verdict for v in found] == ["verbatim", "none", "near", "none"]
    assert [v.generation for v in found] == [0, 1, 0, 1]
    assert [v.attracted for v in found] == [2, 0, 0, 0]
    assert [round(v.control, 6) for v in found] == [0.2, 0.95, 0.2, 0.3]


def test_a_layout_that_comes_back_is_told_apart():
    layouts = torch.tensor([[0.9, 0.2], [0.1, 0.1]])
    found = evidence([[0.6, 0.6]], [[0.1, 0.1]], layouts=layouts)
    assert [v.verdict for v in verdicts(found, layout_limit=0.8)] == ["template", "near"]
    assert [v.verdict for v in verdicts(found, layout_limit=None)] == ["near", "near"]


def test_a_threshold_is_what_controls_carry():
    controls = torch.linspace(0, 0.5, 99)
    near = near_threshold(controls)
    assert (controls > near).float().mean() <= 0.05
    assert near_threshold(controls[: NEEDED - 1]) is None
    made = thresholds(controls[:40], controls[40:60], controls[60:])
    assert made.near == near
    assert near < made.verbatim == pytest.approx((1 + near) / 2)
    assert "40 training images" in made.method
    assert "20 held-out" in made.method


def test_too_few_controls_give_no_verdict_and_say_what_is_needed():
    few = thresholds(torch.rand(5), torch.empty(0), torch.rand(5))
    assert (few.near, few.verbatim) == (None, None)
    found = verdicts(of_best([0.99] * 5), few)
    assert {v.verdict for v in found} == {"none"}
    headline = summarize(found, of_best([0.99] * 5), few, WORKS)
    assert not headline.given
    assert "Give 9 or more images" in headline.text


@pytest.mark.parametrize(("n", "copies"), [(20, 20), (20, 6), (12, 0), (20, 3), (4, 0), (4, 4)])
def test_a_headline_is_given_only_where_the_test_carries_it(n, copies):
    found = of_best([0.9] * copies + [0.2] * (n - copies))
    headline = summarize(verdicts(found), found, LIMITS, WORKS)
    # By counting: how often would n of 2 n images hold all copies, if LoRA on and off were alike?
    chance = by_counting(copies, n)
    assert fisher(copies, n, 0, n) == pytest.approx(chance)
    carried = chance < 0.05 if copies else by_counting(n, n) < 0.05
    assert headline.given == carried
    assert (headline.reproduced.count, headline.controls.count) == (copies, 0)
    assert headline.reproduced.low <= copies / n <= headline.reproduced.high
    if carried and copies:
        assert f"{copies} of {n} training images come back" in headline.text


def by_counting(copies: int, n: int) -> float:
    """Return the chance that all copies fall among the first n of 2 n images, one by one."""
    chance = 1.0
    for place in range(copies):
        chance *= (n - place) / (2 * n - place)
    return chance


def test_a_refusal_names_the_controls_that_would_carry_it():
    found = of_best([0.9] * 3 + [0.2] * 17)
    text = summarize(verdicts(found), found, LIMITS, WORKS).text
    more = int(text.split(" more controls")[0].split()[-1])
    assert fisher(3, 20, 0, 20 + more) < 0.05 <= fisher(3, 20, 0, 20 + more - 1)


def test_controls_that_come_back_as_well_take_the_claim_away():
    n = 20
    likely = of_best([0.9] * n, control=0.9)
    headline = summarize(verdicts(likely), likely, LIMITS, WORKS)
    assert not headline.given
    assert headline.controls.count == n


def test_held_out_images_are_controls():
    """A LoRA that comes as near to images it never saw has learnt the subject, not the images."""
    on = torch.eye(30) * 0.8 + 0.1
    found = evidence(on.tolist(), [[0.1] * 30], held_out=15)
    headline = summarize(verdicts(found), found, LIMITS, WORKS)
    assert headline.controls.count == 15
    assert headline.controls.total == 30
    assert headline.p_value == pytest.approx(fisher(15, 15, 15, 30))


def test_a_failed_instrument_says_nothing():
    found = of_best([0.9] * 20)
    headline = summarize(verdicts(found), found, LIMITS, FAILS)
    assert not headline.given
    assert headline.text.startswith("The instrument failed")


def test_under_chance_alone_headlines_are_rare():
    """Images and controls from one distribution, thresholds included: at most `LEVEL` false."""
    generator, false = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        best, control, peers = torch.rand(3, 20, generator=generator).mul(0.4).add(0.3)
        found = of_best(best.tolist())
        found.matrix[-1] = control
        limits = thresholds(control, torch.empty(0), peers)
        headline = summarize(verdicts(found, limits), found, limits, WORKS)
        false += headline.given and headline.reproduced.count > 0
    assert false <= 10


def test_fisher_against_all_tables():
    """Slow and plainly right: every way to pick which of all images are copies."""
    for hits, n, control_hits, controls in product(range(4), [3], range(3), [2]):
        total, marked = n + controls, hits + control_hits
        ways = [sum(bits[:n]) for bits in product([0, 1], repeat=total) if sum(bits) == marked]
        expected = sum(way >= hits for way in ways) / len(ways)
        assert fisher(hits, n, control_hits, controls) == pytest.approx(expected)
