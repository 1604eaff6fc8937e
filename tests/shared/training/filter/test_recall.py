"""The filter's cheaper mode: which visits are measured, and what it decides on the others."""

import json
import math

import pytest
import torch
from small_text import seeded
from unmemorize.shared.training.filter.expectation import Recall, Visits
from unmemorize.shared.training.filter.filter import MemorizationFilter
from unmemorize.shared.training.filter.sample_log import Sample, SampleLog, read_records
from unmemorize.shared.training.filter.thresholds import (
    AbsoluteThreshold,
    RelativeThreshold,
    RunningQuantile,
)
from weighing import in_processes, samples_of


def visit(made: MemorizationFilter, cond, timesteps, samples=None) -> tuple[int, torch.Tensor]:
    """Weigh a step as an adapter does; return how many samples took the extra pass."""
    samples = samples or samples_of(len(cond))
    due = made.due(samples, timesteps)
    uncond = torch.zeros_like(cond)[due]
    return int(due.sum()), made.weigh(cond, uncond, timesteps=timesteps, samples=samples)


def test_a_visit_is_measured_when_its_score_is_unknown_near_or_old():
    early, late = torch.tensor([100.0]), torch.tensor([900.0])
    sample, other = Sample(file="a", caption="A"), Sample(file="b", caption="B")

    def filtering(limit: float, **settings) -> MemorizationFilter:
        return MemorizationFilter(AbsoluteThreshold(limit), recall=Recall(**settings))

    def looked(made: MemorizationFilter, sample: Sample, timestep: torch.Tensor) -> int:
        return visit(made, torch.ones(1, 4, 2, 2), timestep, [sample])[0]

    made = filtering(10.0, every=4)
    assert looked(made, sample, early)  # never seen
    assert [looked(made, sample, early) for _ in range(4)] == [0, 0, 0, 1]
    assert looked(made, other, early)
    assert looked(made, sample, late)  # no level yet
    assert not looked(made, Sample(file="a copy", caption="A"), early)  # its caption is known
    for distance, near in ((0.49, 1), (0.51, 0), (-0.49, 1), (-0.51, 0)):
        made = filtering(math.exp(distance), every=9, margin=0.5)
        assert [looked(made, sample, early) for _ in range(2)] == [1, near]
    for distance, near in ((0.24, 1), (0.26, 0), (-0.9, 1)):  # of one that learns
        threshold = RunningQuantile(0.5, bins=1, scores=[[math.exp(distance)] * 64])
        made = MemorizationFilter(threshold, recall=Recall(every=9, margin=0.5))
        assert [looked(made, sample, early) for _ in range(2)] == [1, near]


def test_the_expected_score_stands_in():
    made = MemorizationFilter(AbsoluteThreshold(2.0), recall=Recall(every=2, margin=0.0))
    timesteps = torch.tensor([10.0, 10.0])
    quiet, loud = torch.ones(2, 4, 2, 2), torch.full((2, 4, 2, 2), 100.0)
    assert visit(made, loud, timesteps)[0] == 2
    count, weights = visit(made, quiet, timesteps)  # not looked at
    assert (count, weights.tolist()) == (0, [0, 0])
    assert visit(made, quiet, timesteps)[0] == 2
    assert (made.seen, made.measured, made.flagged) == (6, 4, 4)


def test_measuring_always_is_the_full_filter_bit_for_bit():
    cheap = MemorizationFilter(RunningQuantile(0.8, warmup=4), recall=Recall(every=1))
    full = MemorizationFilter(RunningQuantile(0.8, warmup=4))
    for step in range(20):
        cond = seeded(6, 4, 2, 2, seed=step)
        timesteps = seeded(6, seed=step).abs() * 300
        count, weights = visit(cheap, cond, timesteps)
        assert count == 6
        assert torch.equal(weights, visit(full, cond, timesteps)[1])
    assert cheap.threshold.state_dict() == full.threshold.state_dict()


def test_a_step_with_nothing_to_measure_and_one_that_diverged():
    made = MemorizationFilter(AbsoluteThreshold(2.0), recall=Recall(every=9))
    timesteps = torch.tensor([1.0])
    cond = torch.full((1, 4, 2, 2), 30.0)
    assert visit(made, math.nan * cond, timesteps)[0] == 1
    assert visit(made, cond, timesteps)[0] == 1  # measured again
    count, weights = visit(made, 0 * cond, timesteps)
    assert (count, weights.tolist()) == (0, [0.0])


def test_an_adapter_that_always_measures_decides_like_the_full_filter():
    cheap = MemorizationFilter(AbsoluteThreshold(1.0), recall=Recall(every=10**6, margin=0.0))
    full = MemorizationFilter(AbsoluteThreshold(1.0))
    for step in range(10):
        cond, timesteps = seeded(6, 4, 2, 2, seed=step), torch.full((6,), 500)
        told = {"timesteps": timesteps, "samples": samples_of(6)}
        assert step == 0 or not cheap.due(told["samples"], timesteps).any()
        found = [made.weigh(cond, torch.zeros_like(cond), **told) for made in (cheap, full)]
        assert torch.equal(*found)
    assert cheap.measured == full.measured == 60


@pytest.mark.parametrize(
    ("threshold", "guesses"),
    [(RunningQuantile(0.6, bins=2, warmup=40), False), (AbsoluteThreshold(2.0), True)],
    ids=["one that learns", "one that does not"],
)
def test_a_threshold_that_learns_is_not_moved_by_guesses_above_it(threshold, guesses, tmp_path):
    """Not while it warms up either: what it learns then decides when it stops."""
    log = SampleLog(tmp_path / "samples.jsonl")
    made = MemorizationFilter(threshold, recall=Recall(), log=log)
    generator, above = torch.Generator().manual_seed(0), []
    for _ in range(60):
        size = 1.0 + torch.arange(4.0) + 0.1 * torch.rand(4, generator=generator)
        timesteps = 1000 * torch.rand(4, generator=generator)
        tail, due = threshold.tail(timesteps), made.due(samples_of(4), timesteps)
        expected = made.expectation.scores(Visits.of(samples_of(4), timesteps))
        above += (~due)[expected >= tail].tolist()
        visit(made, size.view(4, 1, 1, 1).expand(4, 4, 2, 2), timesteps)
    log.flush()
    records = read_records([tmp_path / "samples.jsonl"])
    assert any(record.flagged and not record.measured for record in records) == guesses
    assert not any(above)
    assert made.measured < 0.8 * made.seen


def test_the_record_tells_measured_from_expected(tmp_path):
    log = SampleLog(tmp_path / "samples.jsonl")
    recall = Recall(every=3, margin=0.0)
    made = MemorizationFilter(AbsoluteThreshold(2.0), recall=recall, log=log)
    cond = torch.full((1, 4, 2, 2), 3.0)
    for _ in range(4):
        visit(made, cond, torch.tensor([10.0]))
        cond = cond * 10  # nobody looks
    log.flush()
    records = read_records([tmp_path / "samples.jsonl"])
    assert [record.measured for record in records] == [True, False, False, True]
    assert [record.score for record in records] == pytest.approx([3, 3, 3, 3000])


THRESHOLDS = {
    "quantile": lambda: RunningQuantile(0.6, bins=3, warmup=4, window=32),
    "ratio": lambda: RelativeThreshold(1.3),
}


@pytest.mark.parametrize("threshold", THRESHOLDS.values(), ids=THRESHOLDS.keys())
def test_several_processes_recall_as_one(threshold):
    """Steps of eight samples out of twelve, whose scores do not move much."""
    order = [torch.randperm(12, generator=torch.Generator().manual_seed(s))[:8] for s in range(40)]

    def run(count: int) -> tuple[list[list[tuple]], list[MemorizationFilter]]:
        steps, filters = [[None] * 8 for _ in order], [None] * count

        def process(rank: int, gather) -> None:
            made = filters[rank] = MemorizationFilter(
                threshold(), gather=gather, recall=Recall(every=5, margin=0.1)
            )
            for number, chosen in enumerate(order):
                rows = list(range(8))[rank::count]  # as a distributed sampler shares a batch out
                own = chosen[rows]
                noise = seeded(8, 4, 2, 2, seed=number)[rows]
                cond = (1.0 + own).view(-1, 1, 1, 1) * (1 + 0.1 * noise)
                timesteps = (own * 80 + number * 7) % 1000
                samples = [samples_of(12)[int(each)] for each in own]
                due = made.due(samples, timesteps)
                weights = made.weigh(
                    cond, torch.zeros_like(cond)[due], timesteps=timesteps, samples=samples
                )
                for row, *told in zip(rows, due.tolist(), weights.tolist(), strict=True):
                    steps[number][row] = tuple(told)

        in_processes(count, process)
        return steps, filters

    alone, (single,) = run(1)
    assert 0 < single.measured < single.seen
    assert 0 < single.flagged < single.seen
    for count in (2, 4):
        shared, filters = run(count)
        assert shared == alone
        # Each process could save the state from which all go on.
        for made in filters:
            assert made.state_dict() == single.state_dict()


@pytest.mark.parametrize("threshold", THRESHOLDS.values(), ids=THRESHOLDS.keys())
def test_a_resumed_recall_goes_on(threshold):
    def fresh() -> MemorizationFilter:
        return MemorizationFilter(threshold(), recall=Recall(every=3, margin=0.1))

    size = (1.0 + torch.arange(8)).view(-1, 1, 1, 1)
    steps = [(size * seeded(8, 4, 2, 2, seed=s), seeded(8, seed=s).abs() * 400) for s in range(12)]
    whole, first, second = fresh(), fresh(), fresh()
    expected = [visit(whole, *step) for step in steps]
    for step in steps[:5]:
        visit(first, *step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step, (count, weights) in zip(steps[5:], expected[5:], strict=True):
        found = visit(second, *step)
        assert found[0] == count
        assert torch.equal(found[1], weights)
    assert second.state_dict() == whole.state_dict()
    assert sum(count for count, _ in expected) < 96


def test_what_does_not_fit_is_refused():
    made = MemorizationFilter(AbsoluteThreshold(2.0), recall=Recall())
    cond = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match="must hold the 2 due, got 1"):
        made.weigh(cond, cond[:1], timesteps=torch.zeros(2), samples=samples_of(2))
    with pytest.raises(ValueError, match="`every`"):
        Recall(every=0)
    with pytest.raises(ValueError, match="`margin`"):
        Recall(margin=-0.1)


def test_what_an_earlier_version_remembered_is_not_taken_over():
    made = MemorizationFilter(AbsoluteThreshold(2.0), recall=Recall())
    old = {"calls": 3, "seen": 6, "measured": 5, "flagged": 1, "threshold": {},
           "recall": {"known": [[1, 0.5, 2]], "levels": [[0, -3.0]]}}  # fmt: skip
    made.load_state_dict(old)
    assert (made.seen, made.measured) == (6, 5)
    assert made.due(samples_of(2), torch.zeros(2)).all()
    assert made.draws  # it did not say, so whole batches are repeated


def test_a_table_of_visits_comes_back():
    visits = Visits.of(samples_of(3), torch.tensor([1, 2, 3]))
    found = Visits.from_table(visits.table())
    for one, other in zip(visits, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert len(set(visits.captions.tolist())) == len(set(visits.files.tolist())) == 3
