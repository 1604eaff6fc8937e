"""The sequential mode: agreement with full detection, monotonicity, and its error on controls."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ToyDenoiser, prompts
from unmemorize.shared.score.calibration import Calibration, settings_of
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect, mean_over_seeds
from unmemorize.shared.score.sequential import SettlingRule, detect_sequentially

CONFIG = DetectionConfig()
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # scores are about 1


@pytest.fixture(scope="module")
def toy() -> ToyDenoiser:
    return ToyDenoiser()


@pytest.fixture(scope="module")
def calibration(toy) -> Calibration:
    controls = detect(toy, prompts(120, seed=9), CONFIG)
    return Calibration.from_controls(
        controls, model="m", settings=settings_of(toy, CONFIG), name="toy", false_positive_rate=0.1
    )


def scores_of(number: int, seeds: int, spread: float, seed: int) -> torch.Tensor:
    """Scores with a strength per prompt, a level per seed and noise, [prompt seed]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    levels = (0.3 * torch.randn(seeds, generator=torch.Generator().manual_seed(0))).double()
    return (0.5 * normal(number, 1) + levels + spread * normal(number, seeds)).exp()


def draws(scores: torch.Tensor, rule: SettlingRule, levels: torch.Tensor) -> torch.Tensor:
    """Scores with NaN where the rule draws no more; the slow way, prompt by prompt."""
    drawn = torch.full_like(scores, torch.nan)
    for i, row in enumerate(scores):
        for k in range(len(row)):
            drawn[i, k] = row[k]
            estimate = mean_over_seeds(drawn[i : i + 1], levels)
            if rule.settled(estimate, k + 1):
                break
    return drawn


def test_error_zero_draws_every_seed(toy, calibration):
    texts = prompts(30)
    full, found = detect(toy, texts, CONFIG), detect_sequentially(
        toy, texts, CONFIG, calibration, error=0.0
    )  # fmt: skip
    assert found.seeds_drawn.tolist() == [4] * 30
    torch.testing.assert_close(found.traces, full.traces, **CLOSE)
    torch.testing.assert_close(found.scores, full.scores, **CLOSE)


def test_drawn_seeds_are_those_of_full_detection_and_stop_as_the_rule_says(toy, calibration):
    texts = prompts(150, seed=2)
    full = detect(toy, texts, CONFIG)
    found = detect_sequentially(toy, texts, CONFIG, calibration, error=0.3)
    rule = SettlingRule.from_controls(calibration.seed_scores, calibration.threshold, 0.3)
    expected = draws(full.traces.mean(2), rule, calibration.seed_scores.median(0).values)
    torch.testing.assert_close(found.traces.mean(2), expected, **CLOSE, equal_nan=True)
    assert found.seeds_drawn.double().mean() < 3
    assert not found.scores.isnan().any()


@pytest.mark.parametrize("error", [0.0, 0.02, 0.5])
def test_progress_counts_every_seed_once_as_it_is_drawn(toy, calibration, error):
    """Drawn, or no longer needed; a forward pass at a time, so that a bar moves within a chunk."""
    counts, texts = [], prompts(150, seed=2)
    config = replace(CONFIG, batch_size=4)
    found = detect_sequentially(
        toy, texts, config, calibration, error=error, progress=counts.append
    )
    assert sum(counts) == len(texts) * len(CONFIG.seeds)
    assert len(counts) >= found.seeds_drawn.sum() / 4


def test_forwards_are_those_of_the_seeds_drawn(calibration):
    toy = ToyDenoiser()
    found = detect_sequentially(toy, prompts(90), CONFIG, calibration, error=0.3)
    assert sum(toy.rows) == 4 + int(found.seeds_drawn.sum())


def test_a_larger_error_never_draws_more(toy, calibration):
    texts = prompts(60, seed=4)
    previous = None
    for error in (0.0, 0.06, 0.2, 0.5, 1.0):
        drawn = detect_sequentially(toy, texts, CONFIG, calibration, error=error).seeds_drawn
        assert previous is None or (drawn <= previous).all()
        previous = drawn
    assert previous.double().mean() < 2  # it did move


@settings(max_examples=40, deadline=None)
@given(
    number=st.integers(2, 80), seeds=st.integers(1, 5), seed=st.integers(0, 999),
    errors=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)  # fmt: skip
def test_the_band_shrinks_with_the_error(number, seeds, seed, errors):
    scores = scores_of(number, seeds, 0.2, seed)
    wide, narrow = (SettlingRule.from_controls(scores, 1.0, error) for error in sorted(errors))
    assert wide.spread >= narrow.spread >= 0
    estimates = scores.mean(1)
    for drawn in range(1, seeds + 1):
        assert not (wide.settled(estimates, drawn) & ~narrow.settled(estimates, drawn)).any()


def test_a_prompt_is_settled_when_its_whole_band_lies_on_one_side():
    rule = SettlingRule(threshold=10.0, spread=0.4, seeds=4, usual=(99.0,) * 3)
    for drawn, half in ((1, 0.4 * 0.75**0.5), (2, 0.4 * 0.5), (3, 0.4 * (1 / 12) ** 0.5)):
        ends = [10 * math.exp(side * half) for side in (-1, 1)]
        estimates = torch.tensor([0, 0.999 * ends[0], 1.001 * ends[0], 10, 0.999 * ends[1],
                                  1.001 * ends[1], 1e9], dtype=torch.float64)  # fmt: skip
        expected = [True, True, False, False, False, True, True]
        assert rule.settled(estimates, drawn).tolist() == expected
    assert rule.settled(estimates, 4).all()


def test_seeds_that_scale_all_prompts_alike_settle_at_once():
    scores = scores_of(50, 4, 0.0, 0)
    rule = SettlingRule.from_controls(scores, scores.mean(1).median().item(), 0.05)
    assert rule.spread < 1e-9
    levels = scores.median(0).values
    assert (~draws(scores, rule, levels).isnan()).sum() <= 49 + 4  # one stands at the threshold


def test_verdicts_differ_from_full_ones_at_most_at_the_error():
    """The bound for prompts like the controls, over many calibrations of 99 controls."""
    error, wrong, total, drawn = 0.05, 0, 0, 0.0
    for seed in range(60):
        scores = scores_of(199, 4, 0.2, seed)
        controls, new = scores[:99], scores[99:]
        # A threshold in the middle, where verdicts are hard.
        threshold = controls.mean(1).median().item()
        rule = SettlingRule.from_controls(controls, threshold, error)
        levels = controls.median(0).values
        found = draws(new, rule, levels)
        wrong += int(
            ((mean_over_seeds(found, levels) > threshold) != (new.mean(1) > threshold)).sum()
        )
        drawn += (~found.isnan()).sum().item()
        total += len(new)
    assert wrong / total <= error
    assert wrong > 0  # the rule does take risks
    after_one = mean_over_seeds(new.where(torch.arange(4) < 1, torch.nan), levels) > threshold
    assert (after_one != (new.mean(1) > threshold)).double().mean() > error  # they were needed
    assert drawn / total < 3.5


def test_without_enough_controls_nothing_settles_early():
    rule = SettlingRule.from_controls(scores_of(18, 4, 0.2, 0), 1.0, 0.05)
    assert rule.spread == math.inf
    assert not rule.settled(torch.tensor([1e-9, 1e9], dtype=torch.float64), 3).any()
    assert SettlingRule.from_controls(scores_of(19, 4, 0.2, 0), 1.0, 0.05).spread < math.inf


def test_a_control_of_zero_stands_at_the_far_end():
    scores = scores_of(19, 2, 0.1, 0)
    assert SettlingRule.from_controls(scores, 1.0, 0.05).spread < math.inf
    scores[3] = 0
    assert SettlingRule.from_controls(scores, 1.0, 0.05).spread == math.inf


def test_an_interrupted_run_continues_bit_for_bit(toy, calibration):
    texts, journal = prompts(150, seed=6), {}
    full = detect_sequentially(toy, texts, CONFIG, calibration, on_result=journal.__setitem__)
    assert list(journal) == list(range(150))
    known, again = {i: journal[i] for i in range(70)}, []
    found = detect_sequentially(
        toy, texts, CONFIG, calibration, known=known, on_result=lambda i, _: again.append(i)
    )
    assert again == list(range(70, 150))
    torch.testing.assert_close(found.traces, full.traces, rtol=0, atol=0, equal_nan=True)


def test_another_number_of_seeds_is_refused(toy, calibration):
    with pytest.raises(ValueError, match=r"4 seeds and this run 2.*\[0, 1\]"):
        detect_sequentially(toy, ["a"], DetectionConfig(seeds=(0, 1)), calibration)


def test_a_prompt_that_is_unusual_at_the_first_seed_is_drawn_on():
    """Memorized prompts tell more at the second seed than controls do, whose band is narrow."""
    scores = scores_of(399, 4, 0.05, 0)
    scores[:4] *= 20  # controls near memorized prompts raise the threshold
    threshold = scores.mean(1).sort().values[-4].item()
    rule = SettlingRule.from_controls(scores, threshold, 0.02)
    levels = scores.median(0).values
    memorized = levels * torch.tensor([3.5, 200.0, 3.5, 200.0])
    drawn = draws(memorized[None], rule, levels)
    assert mean_over_seeds(drawn, levels) > threshold
    low = rule.threshold / math.exp(rule.spread) > 3.5 * levels.mean()
    assert low  # the band alone would have settled it as not flagged
    ordinary = draws(scores[4:], rule, levels)
    assert (~ordinary.isnan()).sum(1).double().mean() < 1.3
