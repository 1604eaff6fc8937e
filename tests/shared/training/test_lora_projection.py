"""A V = 0 through training, whatever the layers, subspaces and optimizers; and in saved files."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_text import seeded
from torch import nn
from unmemorize.shared.training.lora_factors import (
    UnsupportedTraining,
    factors_of,
    saved_factors,
    text_factors,
)
from unmemorize.shared.training.projection import (
    Projection,
    ProjectionFailed,
    check,
    check_file,
    residuals,
)
from unmemorize.shared.training.subspace import ConceptSubspace
from unmemorize.shared.weights import ModelError

WIDTH, RANK = 24, 4


def subspace_of(width: int = WIDTH, rank: int = 5, seed: int = 7) -> ConceptSubspace:
    return ConceptSubspace(basis=torch.linalg.qr(seeded(width, rank, seed=seed)).Q)


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


@pytest.mark.parametrize("kernel", [None, 1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_of_every_optimizer_stays_outside(name, kernel):
    if name == "muon" and kernel:
        pytest.skip("Muon is for matrices")
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
        assert min(residuals(factors, [subspace]).values()) > 0.1
        assert read_by(network.attn2_to_k, subspace.basis) > 0.1
        with pytest.raises(ProjectionFailed, match="2 of 2"):
            check(factors, [subspace])


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
    assert max(residuals(factors, [subspace]).values()) < 1e-12


def test_two_widths_have_two_subspaces():
    factors = {"a": seeded(2, 8), "b": seeded(2, 12), "c": seeded(2, 8, seed=3)}
    subspaces = [subspace_of(8, 2), subspace_of(12, 3)]
    Projection(factors, subspaces).project_weights()
    assert check(factors, subspaces) < 1e-12
    with pytest.raises(ValueError, match="different widths"):
        Projection(factors, [*subspaces, subspace_of(8, 1)])
    with pytest.raises(ValueError, match="b reads states of width 12"):
        Projection(factors, subspaces[:1])


def test_an_empty_subspace_changes_no_bit():
    plain, guarded = Network(3), Network(3)
    train(plain, OPTIMIZERS["adam"](plain.parameters()))
    optimizer = OPTIMIZERS["adam"](guarded.parameters())
    projection = Projection(text_factors(guarded), [ConceptSubspace.empty(WIDTH)])
    with projection.attached(optimizer):
        train(guarded, optimizer, before_step=projection.project_gradients)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, guarded.state_dict()[name]), name
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
    monkeypatch.setattr("unmemorize.shared.training.projection.BLOCK", 5 * WIDTH)
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
    check(factors, [subspace])


def named(**shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(name.replace("__", "."), nn.Parameter(torch.zeros(s))) for name, s in shapes.items()]


LORA = {
    "attn2__to_k__lora_A__default__weight": (4, 8),
    "attn2__to_k__lora_B__default__weight": (6, 4),
}


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ({"attn2__to_k__lora_magnitude_vector__default__weight": (6,)}, "DoRA"),
        ({"lora_unet_attn2_to_v__dora_scale": (6,)}, "DoRA"),
        ({"lora_unet_attn2_to_v__hada_w1_a": (6, 4)}, "LoHa"),
        ({"lora_unet_attn2_to_v__lokr_w1": (2, 2)}, "LoKr"),
        ({"attn2__to_v__ia3_l__default": (6, 1)}, "IA"),
        ({"attn2__to_v__oft_R__default__weight": (6, 1)}, "OFT"),
        ({"attn2__to_v__lora_E__default": (4, 1)}, "AdaLoRA"),
        ({"attn2__to_k__lora_B__default__bias": (6,)}, "bias"),
        ({"attn2__to_k__weight": (6, 8)}, "full fine-tuning"),
        ({"lora_te1_text_model_0_q__lora_down__weight": (4, 8)}, "text encoder"),
        ({"text_encoder__layers__0__lora_A__default__weight": (4, 8)}, "text encoder"),
    ],
)
def test_what_would_not_be_exact_is_refused_before_the_first_step(extra, kind):
    with pytest.raises(UnsupportedTraining, match=kind):
        text_factors(named(**LORA, **extra))
    frozen = [(name, p.requires_grad_(False)) for name, p in named(**extra)]
    assert list(text_factors([*named(**LORA), *frozen])) == ["attn2.to_k"]


def test_other_layers_may_be_trained_in_any_way():
    free = named(**LORA, attn1__to_k__hada_w1_a=(2, 2), conv_in__weight=(2, 2))
    assert list(text_factors(free)) == ["attn2.to_k"]
    with pytest.raises(UnsupportedTraining, match="nothing to project"):
        text_factors(named(transformer__attn__to_k__lora_A__default__weight=(4, 8)))


def test_real_peft_layers_are_found_and_real_dora_refused(tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    def model(dora: bool) -> nn.Module:
        block = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": nn.Linear(WIDTH, 6)})})
        config = LoraConfig(r=RANK, target_modules=["to_k"], use_dora=dora)
        return get_peft_model(block, config)

    with pytest.raises(UnsupportedTraining, match="DoRA"):
        text_factors(model(True))
    network = model(False)
    factors = text_factors(network)
    assert [name.split(".")[-1] for name in factors] == ["to_k"]
    Projection(factors, [subspace_of()]).project_weights()
    down = next(iter(factors.values())).detach()
    state = {f"unet.{n}": p.detach() for n, p in network.named_parameters() if "lora_" in n}
    save_file(state, tmp_path / "lora.safetensors")
    assert torch.equal(next(iter(saved_factors(tmp_path / "lora.safetensors").values())), down)


DIALECTS = {
    "kohya": ("lora_unet_down_blocks_0_attn2_to_{}", ".lora_down.weight", ".lora_up.weight"),
    "peft": ("base_model.model.mid.attn2.to_{}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": ("unet.mid.attn2.to_{}", ".lora.down.weight", ".lora.up.weight"),
    "processor": ("unet.mid.attn2.processor.to_{}", "_lora.down.weight", "_lora.up.weight"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-3), (torch.float32, 1e-6)])
def test_saved_files_of_every_dialect_are_checked(dialect, dtype, bound, tmp_path):
    from safetensors.torch import save_file

    module, down, up = DIALECTS[dialect]
    subspace = subspace_of(320, 8)
    factors = {module.format(part): seeded(16, 320, seed=ord(part)) for part in "kv"}
    path = tmp_path / "lora.safetensors"

    def save() -> None:
        state = {f"{name}{down}": value.to(dtype) for name, value in factors.items()}
        state |= {f"{name}{up}": torch.zeros(6, 16) for name in factors}
        state[f"unet.attn1.to_k{down}"] = torch.ones(2, 64)  # reads no text
        state[f"unet.attn1.to_k{up}"] = torch.ones(6, 2)
        save_file(state, path)

    save()
    with pytest.raises(ProjectionFailed, match="2 of 2"):
        check_file(path, [subspace])
    Projection(factors, [subspace]).project_weights()
    save()
    assert check_file(path, [subspace]) < bound


def test_files_that_cannot_be_certified_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "lora.safetensors"
    pair = {"lora_unet_attn1_to_k.lora_down.weight": torch.ones(2, 8),
            "lora_unet_attn1_to_k.lora_up.weight": torch.ones(8, 2)}  # fmt: skip
    save_file(pair, path)
    with pytest.raises(ModelError, match="no LoRA factor that reads text"):
        check_file(path, [subspace_of(8, 1)])
    with pytest.raises(ModelError, match="changes a text encoder"):
        factors_of({"lora_te_text_model_q.lora_down.weight": torch.ones(2, 8)})
    save_file(pair | {"lora_unet_attn2_to_k.hada_w1_a": torch.ones(2, 2)}, path)
    with pytest.raises(ModelError, match="LoHa"):
        check_file(path, [subspace_of(8, 1)])
