"""The filter against a plain computation; bit-identity when off; the same in every process."""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_text import seeded
from torch import nn
from unmemorize.shared.training.filter.filter import Gather, MemorizationFilter, scale_gradient
from unmemorize.shared.training.filter.sample_log import (
    SampleLog,
    rank_samples,
    read_records,
)
from unmemorize.shared.training.filter.thresholds import AbsoluteThreshold, RunningQuantile
from unmemorize.shared.training.replay import RandomState, aside
from weighing import NEVER, in_processes, weigh


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16), batch=st.integers(1, 6), value=st.floats(0.5, 2),
    action=st.sampled_from(["drop", "downweight", "log"]), scaled=st.booleans(),
)  # fmt: skip
def test_weights_are_those_of_a_loop(seed, batch, value, action, scaled):
    cond, uncond = seeded(2, batch, 4, 3, 3, seed=seed)
    scale = seeded(batch, seed=seed).abs() if scaled else None
    raw = []
    for row in range(batch):
        pairs = zip(cond[row].ravel().tolist(), uncond[row].ravel().tolist(), strict=True)
        score = math.sqrt(sum((a - b) ** 2 for a, b in pairs) / 36)
        score = score * (scale[row].item() if scaled else 1)
        if action == "log" or score < value:
            raw.append(1.0)
        else:
            raw.append(0.0 if action == "drop" else value / score)
    expected = [w * batch / sum(raw) if sum(raw) else 0.0 for w in raw]
    made = MemorizationFilter(AbsoluteThreshold(value), action=action)
    found = weigh(made, cond, uncond, scale=scale)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype))
    assert made.seen == batch
    assert made.calls == 1


def test_score_at_the_threshold_is_dropped_and_only_that_sample():
    cond = torch.zeros(3, 4, 2, 2)
    cond[1], cond[2] = 0.5, 0.49
    weights = weigh(MemorizationFilter(AbsoluteThreshold(0.5)), cond, torch.zeros_like(cond))
    assert weights.tolist() == [1.5, 0.0, 1.5]


def test_a_batch_with_nothing_left_makes_a_zero_gradient():
    parameter = nn.Parameter(torch.ones(2, 4, 2, 2))
    made = MemorizationFilter(AbsoluteThreshold(0.0))
    weights = weigh(made, parameter, torch.zeros_like(parameter))
    assert weights.tolist() == [0.0, 0.0]
    scale_gradient(parameter, weights).square().mean().backward()
    assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert made.flagged == 2


@pytest.mark.parametrize("loss", [nn.functional.mse_loss, nn.functional.smooth_l1_loss])
def test_the_gate_is_the_mean_over_what_remains(loss):
    parameter, target = nn.Parameter(seeded(4, 3, 2, 2)), seeded(4, 3, 2, 2, seed=1)
    weights = torch.tensor([2.0, 0.0, 2.0, 0.0])
    gated = scale_gradient(parameter, weights)
    assert torch.equal(gated, parameter)
    loss(gated, target).backward()
    found, parameter.grad = parameter.grad.clone(), None
    loss(parameter[::2], target[::2]).backward()
    torch.testing.assert_close(found, parameter.grad)
    assert found.abs().sum() > 0


def test_diverged_predictions_are_recorded_and_kept(tmp_path):
    cond = torch.full((1, 4, 2, 2), torch.nan)
    log = SampleLog(tmp_path / "samples.jsonl")
    assert weigh(MemorizationFilter(AbsoluteThreshold(0.1), log=log), cond, cond).item() == 1.0
    log.flush()
    record = read_records([tmp_path / "samples.jsonl"])[0]
    assert math.isnan(record.score)
    assert not record.flagged
    assert rank_samples([record]) == []


def test_quantile_is_that_of_the_bin_and_lets_pass_while_warming_up():
    threshold = RunningQuantile(quantile=0.75, bins=2, warmup=4, window=6)
    late, early = torch.tensor([900.0, 999.0, 1200.0]), torch.tensor([0.0])
    assert threshold.at(late).tolist() == [math.inf] * 3
    threshold.learn(torch.full((8,), 900.0), torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]))
    assert threshold.at(late).tolist() == [np.quantile([3, 4, 5, 6, 7, 8], 0.75)] * 3
    assert threshold.at(early).tolist() == [math.inf]
    threshold.learn(torch.tensor([900.0]), torch.tensor([math.nan]))
    assert len(threshold.scores[1]) == 6


def test_quantile_stops_about_its_share():
    made = MemorizationFilter(RunningQuantile(quantile=0.9, bins=4, warmup=32))
    for step in range(200):
        cond = seeded(8, 4, 4, 4, seed=step)
        weigh(made, cond, torch.zeros_like(cond), seeded(8, seed=step).abs() * 300)
    assert 0.07 < made.flagged / made.seen < 0.13


def run_processes(count: int, batches: list[torch.Tensor]) -> tuple[list, list]:
    """Return weighted losses per step and the filters of `count` processes that share batches."""
    losses, filters = [[None] * count for _ in batches], [None] * count

    def process(rank: int, gather: Gather) -> None:
        made = filters[rank] = MemorizationFilter(
            RunningQuantile(quantile=0.6, bins=3, warmup=4, window=16), gather=gather
        )
        for step, batch in enumerate(batches):
            own = batch[rank::count]  # as a distributed sampler shares a batch out
            timesteps = own.flatten(1).sum(1).abs() * 100
            weights = weigh(made, own, torch.zeros_like(own), timesteps)
            losses[step][rank] = float((weights * own.flatten(1).mean(1)).mean())

    in_processes(count, process)
    return [sum(each) / count for each in losses], filters


def test_several_processes_decide_as_one():
    batches = [seeded(8, 4, 2, 2, seed=step) for step in range(20)]
    alone, (single,) = run_processes(1, batches)
    assert 0 < single.flagged < single.seen
    for count in (2, 4):
        shared, filters = run_processes(count, batches)
        assert shared == pytest.approx(alone, rel=1e-12)
        for made in filters:
            assert made.state_dict() == single.state_dict()


def test_a_resumed_filter_decides_as_if_it_had_not_stopped():
    def fresh() -> MemorizationFilter:
        return MemorizationFilter(RunningQuantile(quantile=0.6, bins=3, warmup=4, window=16))

    batches = [seeded(8, 4, 2, 2, seed=step) for step in range(10)]
    whole, first, second = fresh(), fresh(), fresh()
    expected = [weigh(whole, batch, torch.zeros_like(batch)) for batch in batches]
    for batch in batches[:5]:
        weigh(first, batch, torch.zeros_like(batch))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found = [weigh(second, batch, torch.zeros_like(batch)) for batch in batches[5:]]
    assert all(map(torch.equal, found, expected[5:]))
    assert second.state_dict() == whole.state_dict()
    with pytest.raises(ValueError, match="`bins` was 3"):
        RunningQuantile(bins=4).load_state_dict(whole.threshold.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AbsoluteThreshold(-1.0), "`value`"),
        (lambda: AbsoluteThreshold(math.nan), "`value`"),
        (lambda: RunningQuantile(quantile=1.0), "`quantile`"),
        (lambda: RunningQuantile(bins=0), "`bins`"),
        (lambda: RunningQuantile(span=(1.0, 1.0)), "rising"),
        (lambda: RunningQuantile(warmup=9, window=8), "`warmup`"),
        (lambda: MemorizationFilter(NEVER, action="ignore"), "`action`"),
    ],
)
def test_settings_refuse_nonsense(make, message):
    import beartype.roar
    import jaxtyping

    refused = (ValueError, beartype.roar.BeartypeException, jaxtyping.TypeCheckError)
    with pytest.raises(refused) as error:
        make()
    if isinstance(error.value, ValueError):
        assert message in str(error.value)


def draws() -> list[float]:
    return [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002


def test_a_forward_aside_repeats_the_draws_and_leaves_no_trace():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    state = RandomState.now()
    first = draws()
    with aside(state):
        assert draws() == first
        assert not torch.is_grad_enabled()
    after = draws()
    state.restore()
    assert draws() == first
    assert draws() == after
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), aside(state):
        raise RuntimeError(f"stop after {draws()}")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("first", [True, False])
def test_a_forward_aside_under_autocast_leaves_the_gradient(first):
    layer = nn.Linear(4, 4)
    x = torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        if first:
            with aside(RandomState.now()):
                layer(x)
        out = layer(x)
        if not first:
            with aside(RandomState.now()):
                layer(x)
    out.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


class TextNetwork(nn.Module):
    """Reads a text vector and a latent, with dropout."""

    def __init__(self):
        super().__init__()
        self.to_k, self.to_q = nn.Linear(6, 16), nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return (self.to_q(self.dropout(x.flatten(1))) * self.to_k(text)).view_as(x)


def train_lora(made: MemorizationFilter | None, steps: int = 12) -> dict[str, torch.Tensor]:
    """Train a real PEFT LoRA with dropout, noise and accumulation, and return its weights."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["to_k", "to_q"], lora_dropout=0.2)
    network = get_peft_model(TextNetwork(), config)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        latent, text = torch.randn(4, 4, 2, 2), torch.randn(4, 6)
        timesteps = torch.randint(0, 1000, (4,))
        state = RandomState.now()
        prediction = network(latent, text)
        if made:
            with aside(state):
                uncond = network(latent, torch.zeros_like(text))
            weights = weigh(made, prediction, uncond, timesteps)
            prediction = scale_gradient(prediction, weights)
        nn.functional.mse_loss(prediction, torch.randn_like(latent)).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    return get_peft_model_state_dict(network)


@pytest.mark.parametrize(
    "off", [MemorizationFilter(NEVER), MemorizationFilter(AbsoluteThreshold(0.0), action="log")]
)
def test_an_infinite_threshold_leaves_training_bit_identical(off):
    plain, filtered = train_lora(None), train_lora(off)
    assert plain.keys() == filtered.keys()
    assert all(torch.equal(plain[name], filtered[name]) for name in plain)
    assert off.seen == 48


def test_a_threshold_of_zero_learns_nothing():
    weights = train_lora(MemorizationFilter(AbsoluteThreshold(0.0)))
    assert all(not value.any() for name, value in weights.items() if "lora_B" in name)
    assert any(value.any() for name, value in train_lora(None).items() if "lora_B" in name)
