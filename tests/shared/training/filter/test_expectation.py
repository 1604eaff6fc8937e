"""What earlier visits say of a score: against the truth that made it, and what must not count."""

import json
import math

import numpy as np
import pytest
import torch
from small_text import seeded
from unmemorize.shared.training.filter.expectation import (
    CAPTION_KNOWN,
    FILES_KNOWN,
    Expectation,
    Recall,
    Visits,
)
from unmemorize.shared.training.filter.filter import MemorizationFilter
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.filter.thresholds import RelativeThreshold

CAPTIONS, COPIES = 12, 3
SAMPLES = [
    Sample(file=f"{caption}-{copy}.png", caption=f"caption {caption}")
    for caption in range(CAPTIONS) for copy in range(COPIES)
]  # fmt: skip


def seen(rows, timesteps, scores=None, measured=True) -> Visits:
    visits = Visits.of([SAMPLES[row] for row in rows], torch.as_tensor(timesteps))
    if scores is None:
        return visits
    scores = torch.as_tensor(scores, dtype=torch.float64)
    return visits._replace(scores=scores, measured=torch.full_like(scores, float(measured)))


def truth(row: int, timestep: float, step: int) -> float:
    """A score: ten times from end to end of the timesteps, doubling every 500 steps, by caption."""
    return 10 ** (timestep / 1000) * 2 ** (step / 500) * (1 + row // COPIES / 4)


def learnt(steps: int, noise: float) -> Expectation:
    made, generator = Expectation(), torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(SAMPLES), (8,), generator=generator).tolist()
        timesteps = torch.randint(1000, (8,), generator=generator).tolist()
        blurred = (noise * torch.randn(8, generator=generator)).exp().tolist()
        scores = [
            truth(row, timestep, step) * blur
            for row, timestep, blur in zip(rows, timesteps, blurred, strict=True)
        ]
        made.learn(seen(rows, timesteps, scores))
    return made


@pytest.mark.parametrize(("noise", "error"), [(0.0, 0.06), (0.3, 0.2)])
def test_scores_made_of_the_parts_are_expected(noise, error):
    made, rows, steps = learnt(400, noise), range(len(SAMPLES)), 400
    timesteps = [27.0 * row + 20 for row in rows]  # not at the centres of bins
    expected = torch.tensor([truth(row, t, steps) for row, t in zip(rows, timesteps, strict=True)])
    off = made.scores(seen(rows, timesteps)).log() - expected.log()
    assert off.abs().mean() < error
    assert expected.log().std() > 0.5  # one number for all would not do


@pytest.mark.parametrize(("noise", "error"), [(0.0, 0.03), (0.3, 0.2)])
def test_ratios_are_to_the_median_caption_whatever_the_timestep(noise, error):
    made, rows = learnt(400, noise), range(len(SAMPLES))
    found = made.ratios(seen(rows, [999.0] * len(SAMPLES)))
    assert torch.equal(found, made.ratios(seen(rows, [0.0] * len(SAMPLES))))
    median = (1 + 5 / 4) ** 0.5 * (1 + 6 / 4) ** 0.5  # of twelve captions, in logarithms
    expected = torch.tensor([(1 + row // COPIES / 4) / median for row in rows])
    assert (found.log() - expected.log()).abs().mean() < error


def test_what_each_part_takes_is_taken_from_the_next():
    """Two visits of one file, worked out by hand: e, then e^2."""
    made = Expectation()
    made.learn(seen([0], [550], [math.e]))
    made.learn(seen([0], [550], [math.e**2]))
    left = 1.0 - 0.03  # of the unexpected 1, what the drift leaves
    assert made.drift == pytest.approx(0.03)
    (level, _), (caption, _), (file, _) = (
        each.popitem()[1] for each in (made.levels, made.captions, made.files)
    )
    assert level == pytest.approx(1 + 1 / 3)
    left -= 1 / 3
    assert caption == pytest.approx(left / 2.5)
    left -= caption
    assert file == pytest.approx(left / 5)


def test_copies_of_few_captions_do_not_move_the_median():
    made = Expectation()
    for step in range(60):
        rows = [0, 1, 2, 0, 1, 2, (3 * step + 3) % len(SAMPLES), (3 * step + 6) % len(SAMPLES)]
        scores = [3.0 if SAMPLES[row].caption == SAMPLES[0].caption else 1.0 for row in rows]
        made.learn(seen(rows, [500.0] * 8, scores))
    found = made.ratios(seen([0, 20], [500.0] * 2))
    assert found[0] > 2.5
    assert found[1] == pytest.approx(1, abs=0.1)


def test_the_median_is_that_of_all_captions_and_survives_a_resume():
    made = learnt(60, 0.5)
    resumed = Expectation()
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict())))
    for each in (made, resumed):
        each.learn(seen(range(8), [500] * 8, torch.linspace(0.1, 9, 8)))
        standings = [standing for standing, _ in each.captions.values()]
        visits = seen(range(len(SAMPLES)), [500] * len(SAMPLES))
        found = each.ratios(visits)
        assert each._sorted == sorted(standings)
        for row, sample in enumerate(SAMPLES):
            own = each.files.get(int(visits.files[row]), (0.0,))[0]
            log = each.captions[int(visits.captions[row])][0] + own - np.median(standings)
            assert float(found[row]) == pytest.approx(math.exp(log), rel=1e-12), sample
    assert resumed == made


def test_names_that_are_no_unicode_are_told_apart():
    files = [Sample(file="\udc80.png"), Sample(file="\udc81.png")]  # bytes of another encoding
    assert len(set(Visits.of(files, torch.zeros(2)).files.tolist())) == 2


def test_files_of_one_caption_are_told_apart():
    made = Expectation()
    one = [Sample(file=f"{file}.png", caption="a photo of sks") for file in range(FILES_KNOWN)]
    scores = torch.ones(FILES_KNOWN, dtype=torch.float64)
    scores[0] = 3.0
    for _ in range(60):
        visits = Visits.of(one, torch.full((FILES_KNOWN,), 500))
        made.learn(visits._replace(scores=scores, measured=torch.ones_like(scores)))
    found = made.ratios(visits)
    assert found[0] > 2
    assert found[1:].max() < 1.2


def test_nothing_is_told_before_enough_is_known():
    made = Expectation()
    assert made.scores(seen([0], [500])).isnan().all()
    for _ in range(CAPTION_KNOWN):
        assert made.ratios(seen([0], [500])).isnan().all()
        made.learn(seen(range(FILES_KNOWN - 1), [500] * (FILES_KNOWN - 1), [1.0] * 7))
    assert made.ratios(seen([0], [500])).isnan().all()  # a file is missing
    made.learn(seen([20], [500], [1.0]))
    assert made.ratios(seen([0, 20], [500] * 2)).isnan().tolist() == [False, True]
    assert made.scores(seen([0], [500])).isfinite().all()
    assert made.scores(seen([0], [50])).isnan().all()  # no such timestep yet


def test_what_is_measured_often_does_not_stand_out_where_all_scores_rise():
    """Else the cheaper filter, which measures what is near its threshold, leaves out more."""
    equal = []
    for seed in range(4):
        full = MemorizationFilter(RelativeThreshold(1.5))
        cheap = MemorizationFilter(RelativeThreshold(1.5), recall=Recall(margin=0.25))
        generator = torch.Generator().manual_seed(seed)
        for step in range(300):
            rows = torch.randint(len(SAMPLES), (8,), generator=generator).tolist()
            timesteps = torch.randint(1000, (8,), generator=generator)
            blur = (0.2 * torch.randn(8, generator=generator)).exp()
            sizes = torch.tensor([
                truth(row, timestep, 0) * 2 ** (step / 30)
                for row, timestep in zip(rows, timesteps.tolist(), strict=True)
            ])  # fmt: skip
            cond, samples = (sizes * blur)[:, None], [SAMPLES[row] for row in rows]
            uncond, told = torch.zeros_like(cond), {"timesteps": timesteps, "samples": samples}
            guessed = cheap.weigh(cond, uncond[cheap.due(samples, timesteps)], **told)
            equal += ((guessed > 0) == (full.weigh(cond, uncond, **told) > 0)).tolist()
        assert cheap.measured < 0.4 * cheap.seen
    assert sum(equal) / len(equal) > 0.895  # .85 where skipped visits do not count


@pytest.mark.parametrize("score", [0.0, math.nan, math.inf])
def test_dropped_captions_and_diverged_passes_say_nothing(score):
    made = learnt(20, 0.1)
    before = made.state_dict()
    made.learn(seen([0, 1], [500, 500], [score, score]))
    made.learn(seen([0, 1], [500, 500], [1.0, 1.0], measured=False))
    assert made.state_dict() == before | {"spared": 4}  # but that time passed
    made.learn(seen([0], [500], [1.0]))
    assert made.drift != before["drift"]
    assert made.skipped == 0


def test_a_relative_threshold_stops_what_stands_out_and_nothing_else():
    """One caption of twelve is moved twice as far as the others; single scores are noisy."""
    made, generator = MemorizationFilter(RelativeThreshold(1.5)), torch.Generator().manual_seed(0)
    stopped = torch.zeros(2, 2)
    for step in range(200):
        rows = torch.randint(len(SAMPLES), (8,), generator=generator).tolist()
        timesteps = torch.randint(1000, (8,), generator=generator)
        logs = timesteps / 300 + 0.3 * torch.randn(8, generator=generator)
        size = torch.tensor([2.0 if row < COPIES else 1.0 for row in rows]) * logs.exp()
        cond = size.view(-1, 1, 1, 1) * seeded(8, 4, 16, 16, seed=step).sign()
        told = {"timesteps": timesteps, "samples": [SAMPLES[row] for row in rows]}
        weights = made.weigh(cond, torch.zeros_like(cond), **told)
        if step >= 50:
            for row, weight in zip(rows, weights.tolist(), strict=True):
                stopped[int(row < COPIES), int(weight == 0)] += 1
    shares = stopped[:, 1] / stopped.sum(1)
    assert shares[1] > 0.95
    assert shares[0] < 0.02


def test_nonsense_is_refused():
    for wrong in ({"bins": 0}, {"span": (1.0, 1.0)}):
        with pytest.raises(ValueError, match="`bins`"):
            Expectation(**wrong)
    for ratio in (1.0, 0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="`ratio`"):
            RelativeThreshold(ratio)
