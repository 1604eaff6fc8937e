"""The filter's cheaper mode: which visits are measured, and what it decides on the others."""

import json
import math

import pytest
import torch
from small_text import seeded
from unmemorize.shared.training.filter import MemorizationFilter
from unmemorize.shared.training.recall import Recall, identities
from unmemorize.shared.training.sample_log import Sample, SampleLog, read_records
from unmemorize.shared.training.thresholds import AbsoluteThreshold, RunningQuantile
from weighing import in_processes, samples_of


def visit(made: MemorizationFilter, cond, timesteps, samples=None) -> tuple[int, torch.Tensor]:
    """Weigh a step as an adapter does; return how many samples took the extra pass."""
    samples = samples or samples_of(len(cond))
    due = made.due(samples, timesteps)
    uncond = torch.zeros_like(cond)[due]
    return int(due.sum()), made.weigh(cond, uncond, timesteps=timesteps, samples=samples)


NO_LIMIT = torch.tensor([math.inf])


def test_a_visit_is_measured_when_its_score_is_unknown_near_or_old():
    recall = Recall(every=4, bins=2, margin=0.5)
    sample, other = Sample(file="a"), Sample(file="b")
    early, late = torch.tensor([100.0]), torch.tensor([900.0])

    def visit(sample: Sample, timestep: torch.Tensor, limit: float) -> bool:
        who = identities([sample])
        due = recall.due(who, timestep, torch.tensor([float(limit)]))
        recall.learn(who, timestep, torch.ones(1, dtype=torch.float64), due)
        return bool(due)

    assert visit(sample, early, 10)  # never seen
    assert [visit(sample, early, 10) for _ in range(4)] == [False, False, False, True]
    assert visit(other, early, 10)
    assert visit(Sample(file="a", caption="another"), early, 10)
    assert visit(sample, late, 10)  # no level yet
    assert not visit(sample, late, math.exp(0.51))
    assert visit(sample, late, math.exp(0.49))
    assert visit(sample, late, math.exp(-0.49))
    assert not visit(sample, late, math.exp(-0.51))


def test_scores_that_are_a_level_times_a_standing_are_expected_exactly():
    recall = Recall(every=10**6, bins=4, margin=0.0)
    samples = samples_of(6)
    standing = {sample.file: 1.0 + place for place, sample in enumerate(samples)}
    errors, measured = [], 0
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        row = int(torch.randint(6, (), generator=generator))
        place = int(torch.randint(4, (), generator=generator))
        timestep = torch.tensor([250.0 * place + 1])
        score = standing[samples[row].file] * 10.0**place
        who = identities([samples[row]])
        due = recall.due(who, timestep, NO_LIMIT)
        due |= torch.tensor([step < 200])  # a level is a running mean: it needs its time
        measured += int(due)
        found = score if due else float(recall.expected(who, timestep))
        recall.learn(who, timestep, torch.tensor([found], dtype=torch.float64), due)
        errors.append(abs(math.log(found / score)))
    assert measured == 200
    assert max(errors[200:]) < 0.5  # of scores that span a factor of 6,000


def test_the_expected_score_stands_in():
    made = MemorizationFilter(AbsoluteThreshold(2.0), recall=Recall(every=2, bins=1, margin=0.0))
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
    made = MemorizationFilter(AbsoluteThreshold(2.0), recall=Recall(every=9, bins=1))
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


def test_the_record_tells_measured_from_expected(tmp_path):
    log = SampleLog(tmp_path / "samples.jsonl")
    recall = Recall(every=3, bins=1, margin=0.0)
    made = MemorizationFilter(AbsoluteThreshold(2.0), recall=recall, log=log)
    cond = torch.full((1, 4, 2, 2), 3.0)
    for _ in range(4):
        visit(made, cond, torch.tensor([10.0]))
        cond = cond * 10  # nobody looks
    log.flush()
    records = read_records([tmp_path / "samples.jsonl"])
    assert [record.measured for record in records] == [True, False, False, True]
    assert [record.score for record in records] == pytest.approx([3, 3, 3, 3000])


def test_several_processes_recall_as_one():
    """Steps of eight samples out of twelve, whose scores do not move much."""
    order = [torch.randperm(12, generator=torch.Generator().manual_seed(s))[:8] for s in range(40)]

    def run(count: int) -> tuple[list[list[tuple]], list[MemorizationFilter]]:
        steps, filters = [[None] * 8 for _ in order], [None] * count

        def process(rank: int, gather) -> None:
            made = filters[rank] = MemorizationFilter(
                RunningQuantile(0.6, bins=3, warmup=4, window=32), gather=gather,
                recall=Recall(every=5, bins=3, margin=0.1),
            )  # fmt: skip
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


def test_a_resumed_recall_goes_on():
    def fresh() -> MemorizationFilter:
        return MemorizationFilter(
            RunningQuantile(0.7, bins=2, warmup=3), recall=Recall(every=3, bins=2, margin=0.1)
        )

    steps = [(seeded(4, 4, 2, 2, seed=s), seeded(4, seed=s).abs() * 400) for s in range(12)]
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
    assert sum(count for count, _ in expected) < 48


def test_what_does_not_fit_is_refused():
    made = MemorizationFilter(AbsoluteThreshold(2.0), recall=Recall())
    cond = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match="must hold the 2 due, got 1"):
        made.weigh(cond, cond[:1], timesteps=torch.zeros(2), samples=samples_of(2))
    for wrong in ({"every": 0}, {"bins": 0}, {"span": (1.0, 1.0)}):
        with pytest.raises(ValueError, match="`every` and `bins`"):
            Recall(**wrong)
    with pytest.raises(ValueError, match="`margin`"):
        Recall(margin=-0.1)
