"""A V = 0 through training, whatever the layers, subspaces and optimizers; and in saved files."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_text import seeded, subspace_of
from torch import nn
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.projection.factors import (
    text_factors,
)
from unmemorize.shared.training.projection.projection import (
    Projection,
    ProjectionFailed,
)

WIDTH, RANK = 24, 4


class LoraLayer(nn.Module):
    """Plain LoRA of kohya's shape on a frozen linear or convolution."""

    def __init__(self, width: int, out: int, rank: int, kernel: int | None, seed: int):
        super().__init__()
        taps = () if kernel is None else (kernel, kernel)
        self.register_buffer("base", seeded(out, width, *taps, seed=seed, dtype=torch.float32))
        self.lora_down = nn.Module()
        self.lora_up = nn.Module()
        down = seeded(rank, width, *taps, seed=seed + 1, dtype=torch.float32)
        self.lora_down.weight = nn.Parameter(down)
        self.lora_up.weight = nn.Parameter(torch.zeros(out, rank))

    def delta(self) -> torch.Tensor:
        return torch.tensordot(self.lora_up.weight, self.lora_down.weight, dims=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.base + self.delta()
        if weight.ndim == 2:
            return nn.functional.linear(x, weight)
        places = x.mT.unflatten(-1, (2, -1))  # tokens as a picture two places high
        return nn.functional.conv2d(places, weight, padding="same").flatten(2).mT


class Network(nn.Module):
    """Layers that read text, beside one that does not."""

    def __init__(self, kernel: int | None = None, width: int = WIDTH, dtype=torch.float32):
        super().__init__()
        self.attn2_to_k = LoraLayer(width, 6, RANK, None, 1)
        self.attn2_to_v = LoraLayer(width, 6, RANK, kernel, 2)
        self.attn1_to_k = LoraLayer(6, 6, RANK, None, 3)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn1_to_k(self.attn2_to_k(x).tanh() + self.attn2_to_v(x))


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD with momentum .9: weights are an interpolation of two hidden series."""

    def __init__(self, params, lr=0.02):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                z = state.setdefault("z", p.clone())
                x = state.setdefault("x", p.clone())
                z.sub_(p.grad.sign(), alpha=group["lr"])  # of single entries, as Adam's scaling
                x.lerp_(z, 1 / group["k"])
                p.copy_(x.lerp(z, 0.1))

    @torch.no_grad()
    def eval(self):
        for p, state in self.state.items():
            p.copy_(state["x"])


OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "schedule-free": ScheduleFree,
}
for newer in ("Adafactor", "Muon"):  # since torch 2.5 and 2.9
    if hasattr(torch.optim, newer):
        OPTIMIZERS[newer.lower()] = partial(getattr(torch.optim, newer), lr=0.05)


def train(network, optimizer, steps: int = 30, seed: int = 0, before_step=None, each=None) -> float:
    """Fit random targets, clipping as trainers do, and return the last loss."""
    width = network.attn2_to_k.base.shape[1]
    dtype = network.attn2_to_k.base.dtype
    x, target = seeded(8, 6, width, seed=seed).to(dtype), seeded(8, 6, 6, seed=seed + 1).to(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(network(x), target)
        loss.backward()
        if before_step:
            before_step()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if each:
            each()
    return loss.item()


def read_by(layer: LoraLayer, basis: torch.Tensor) -> float:
    """Return |dW V| / |dW|, what the finished LoRA still reads of the concept."""
    delta = layer.delta().detach().double().movedim(1, -1)
    return float((delta @ basis).norm() / delta.norm())


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        (name, kernel)
        for name in OPTIMIZERS
        for kernel in (None, 1, 3)
        if name != "muon" or kernel is None  # it takes matrices only
    ],
)
def test_every_step_of_every_optimizer_stays_outside(name, kernel):
    network, subspace = Network(kernel), subspace_of()
    optimizer = OPTIMIZERS[name](network.parameters())
    projection = Projection(text_factors(network), [subspace])
    largest = []
    with projection.attached(optimizer):
        train(
            network, optimizer, before_step=projection.project_gradients,
            each=lambda: largest.append(max(projection.residuals().values())),
        )  # fmt: skip
    assert max(largest) < 1e-6
    assert projection.check() < 1e-6
    assert projection.steps == 30
    assert len(projection.factors) == 2
    for layer in (network.attn2_to_k, network.attn2_to_v):
        assert layer.delta().norm() > 0.05  # it learnt
        assert read_by(layer, subspace.basis) < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_projection_or_off_another_subspace_the_concept_is_read(name):
    for other in (None, subspace_of(seed=8)):
        network, subspace = Network(), subspace_of()
        optimizer = OPTIMIZERS[name](network.parameters())
        if other is None:
            train(network, optimizer)
        else:
            with Projection(text_factors(network), [other]).attached(optimizer):
                train(network, optimizer)
        factors = text_factors(network)
        assert min(Projection(factors, [subspace]).residuals().values()) > 0.1
        assert read_by(network.attn2_to_k, subspace.basis) > 0.1
        with pytest.raises(ProjectionFailed, match="2 of 2"):
            Projection(factors, [subspace]).verify()


def test_projecting_the_gradient_alone_is_not_enough():
    network, subspace = Network(), subspace_of()
    optimizer = OPTIMIZERS["adam"](network.parameters())
    projection = Projection(text_factors(network), [subspace])
    projection.project_weights()
    train(network, optimizer, before_step=projection.project_gradients)
    assert max(projection.residuals().values()) > 1e-3


def test_schedule_free_weights_are_projected_after_the_switch():
    network, subspace = Network(), subspace_of()
    optimizer = ScheduleFree(network.parameters())
    projection = Projection(text_factors(network), [subspace])
    with projection.attached(optimizer):
        train(network, optimizer)
        optimizer.eval()
        assert max(projection.residuals().values()) > 1e-3  # the averages were never projected
        projection.project_weights()
        assert projection.check() < 1e-6


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16), width=st.integers(6, 40), rank=st.integers(0, 4),
    kernel=st.sampled_from([None, 1, 2, 3]), layers=st.integers(1, 4),
)  # fmt: skip
def test_the_stacked_product_is_one_direction_after_another(seed, width, rank, kernel, layers):
    subspace = subspace_of(width, rank, seed)
    taps = () if kernel is None else (kernel, kernel)
    factors = {str(i): seeded(3, width, *taps, seed=seed + i) for i in range(layers)}
    expected = {}
    for name, factor in factors.items():
        rows = factor.clone().reshape(3, width, -1)
        for row in range(3):
            for tap in range(rows.shape[2]):
                for direction in subspace.basis.T:
                    rows[row, :, tap] -= (rows[row, :, tap] @ direction) * direction
        expected[name] = rows.reshape(factor.shape)
    Projection(factors, [subspace]).project_weights()
    for name, factor in factors.items():
        torch.testing.assert_close(factor, expected[name], rtol=0, atol=1e-12)
    assert max(Projection(factors, [subspace]).residuals().values()) < 1e-12


def test_two_widths_have_two_subspaces():
    factors = {"a": seeded(2, 8), "b": seeded(2, 12), "c": seeded(2, 8, seed=3)}
    subspaces = [subspace_of(8, 2), subspace_of(12, 3)]
    Projection(factors, subspaces).project_weights()
    assert Projection(factors, subspaces).verify() < 1e-12
    with pytest.raises(ValueError, match="different widths"):
        Projection(factors, [*subspaces, subspace_of(8, 1)])
    with pytest.raises(ValueError, match="b reads states of width 12"):
        Projection(factors, subspaces[:1])


def test_an_empty_subspace_changes_no_bit():
    plain, projected = Network(3), Network(3)
    train(plain, OPTIMIZERS["adam"](plain.parameters()))
    optimizer = OPTIMIZERS["adam"](projected.parameters())
    projection = Projection(text_factors(projected), [ConceptSubspace.empty(WIDTH)])
    with projection.attached(optimizer):
        train(projected, optimizer, before_step=projection.project_gradients)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, projected.state_dict()[name]), name
    assert projection.check() == 0.0


def test_a_projected_gradient_is_all_that_is_clipped():
    network, subspace = Network(), subspace_of()
    projection = Projection(text_factors(network), [subspace])
    optimizer = OPTIMIZERS["sgd"](network.parameters())
    gradients = []

    def project_and_look():
        projection.project_gradients()
        down = network.attn2_to_k.lora_down.weight
        gradients.append(float((down.grad.double() @ subspace.basis).norm()))

    with projection.attached(optimizer):
        train(network, optimizer, steps=3, before_step=project_and_look)
    assert max(gradients) < 1e-6


def test_the_first_forward_pass_reads_nothing_either():
    network, subspace = Network(3), subspace_of()
    projection = Projection(text_factors(network), [subspace])
    assert min(projection.residuals().values()) > 0.1
    with projection.attached(OPTIMIZERS["adam"](network.parameters())):
        assert max(projection.residuals().values()) < 1e-6


def test_leaving_the_block_leaves_no_trace():
    network = Network()
    optimizer = OPTIMIZERS["adam"](network.parameters())
    projection = Projection(text_factors(network), [subspace_of()])
    with pytest.raises(RuntimeError, match="stop"), projection.attached(optimizer):
        raise RuntimeError("stop")
    train(network, optimizer, steps=2)
    assert projection.steps == 0
    with pytest.raises(ProjectionFailed, match="No optimizer step"):
        projection.check()
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="2 of 2 factors"), projection.attached(foreign):
        pass


def test_autocast_around_the_step_costs_no_digits():
    factors = {"a": seeded(16, 320, dtype=torch.float32)}
    projection = Projection(factors, [subspace_of(320, 8)])
    with torch.autocast("cpu", torch.bfloat16):
        projection.project_weights()
    assert max(projection.residuals().values()) < 1e-6


def test_a_step_taken_by_hand_counts():
    factors = {"a": seeded(4, WIDTH, dtype=torch.float32)}
    projection = Projection(factors, [subspace_of()])
    projection.after_step()
    assert projection.check() < 1e-6


def test_blocks_of_a_large_stack_are_put_back_in_order(monkeypatch):
    factors = {str(i): seeded(3, WIDTH, 2, 2, seed=i) for i in range(5)}
    alone = {name: factor.clone() for name, factor in factors.items()}
    for name, factor in alone.items():
        Projection({name: factor}, [subspace_of()]).project_weights()
    monkeypatch.setattr("unmemorize.shared.training.projection.projection.BLOCK", 25 * WIDTH)
    Projection(factors, [subspace_of()]).project_weights()
    for name, factor in factors.items():
        torch.testing.assert_close(factor, alone[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_projected_in_full(dtype):
    factors = {"a": seeded(16, 320).to(dtype)}
    subspace = subspace_of(320, 8)
    projection = Projection(factors, [subspace])
    projection.project_weights()
    found = max(projection.residuals().values())
    assert 0 < found < 1e-3
    Projection(factors, [subspace]).verify()
