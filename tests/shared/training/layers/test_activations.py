"""Subspaces of single layers: what a concept's samples put there is kept out of the LoRA."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from small_text import seeded, subspace_of
from torch import nn
from toy import ToyDenoiser
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.layers.activations import Sketch, recording, run_noisy
from unmemorize.shared.training.layers.fitting import subspaces_from_sketches
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.shared.training.projection.factors import text_factors
from unmemorize.shared.training.projection.projection import (
    Projection,
    ProjectionFailed,
    check_file,
)

WIDTH, MARK, WANTED = 24, 3, 8
"""Inputs hold wanted directions 0..7; the concept adds one along axis `MARK` of those after."""


class Network(nn.Module):
    """A linear layer, a convolution behind it, and a text-fed layer."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, 12)
        self.conv = nn.Conv2d(12, 6, 3, padding=1)
        self.attn2 = nn.ModuleDict({"to_k": nn.Linear(16, 6)})

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        places = self.to_q(x).mT.unflatten(-1, (4, 4))
        return self.conv(places).mean((2, 3)) + self.attn2["to_k"](text)


def lora_network(**settings) -> nn.Module:
    torch.manual_seed(0)
    targets = ["to_q", "conv", "to_k"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=True, **settings)
    return get_peft_model(Network(), config).eval()


def inputs(concept: bool, seed: int, count: int = 32) -> torch.Tensor:
    x = torch.zeros(count, 16, WIDTH)
    x[..., :WANTED] = seeded(count, 16, WANTED, seed=seed).float()
    x[..., 0] += 5  # what every sample holds, the concept's too
    if concept:
        x[..., WANTED + MARK] += 1 + seeded(count, 16, seed=seed + 1).float()
    return x


def factors_without_text(network: nn.Module) -> dict[str, nn.Parameter]:
    return text_factors(network, text_fed="to_q|conv")


def record(network: nn.Module, concept: bool) -> dict[str, Sketch]:
    with recording(readers(network)) as sketches, torch.no_grad():
        for seed in range(4):
            network(inputs(concept, seed), torch.zeros(32, 16))
    return sketches


def readers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the down layers, which read what their layers read, by the name of the factor."""
    names = factors_without_text(network)
    return {name: network.get_submodule(f"{name}.lora_A.default") for name in names}


def fitted(network: nn.Module) -> tuple[dict[str, nn.Parameter], LayerSubspaces]:
    learnt = subspaces_from_sketches(record(network, True), record(network, False))
    return factors_without_text(network), learnt


def test_the_retained_mean_is_retained_where_nothing_else_varies_along_it():
    always, mark, varies = 0, 1, 2
    concept, retained = Sketch(4), Sketch(4)
    noise = seeded(64, seed=0).double()
    retained.add(torch.stack([torch.ones(64), torch.zeros(64), noise, torch.zeros(64)], 1))
    rows = torch.zeros(64, 4, dtype=torch.float64)
    rows[:, always], rows[:, mark] = 3, 1  # three times what all have, and its own
    concept.add(rows)
    basis = subspaces_from_sketches({"layer": concept}, {"layer": retained}).bases["layer"]
    assert basis.square().sum(1)[mark] > 0.9
    assert basis.square().sum(1)[always] < 0.1
    assert basis.square().sum(1)[varies] < 0.05


def test_the_concepts_direction_is_found_and_what_is_wanted_is_left():
    _, layers = fitted(lora_network())
    basis = next(basis for name, basis in layers.bases.items() if "to_q" in name)
    inside = basis.square().sum(1)
    assert inside[WANTED + MARK] > 0.99
    assert inside[:WANTED].max() < 0.01
    named = next(shares for name, shares in layers.provenance["inside"].items() if "to_q" in name)
    assert named["retained"] < 0.05 < named["concept"]


def test_with_one_set_against_itself_nothing_is_forbidden():
    sketches = record(lora_network(), True)
    layers = subspaces_from_sketches(sketches, sketches)
    assert all(not basis.shape[1] for basis in layers.bases.values())


def test_a_layer_is_recorded_where_its_factor_reads():
    network = lora_network()
    x = inputs(True, 0, count=2)
    with recording(readers(network)) as sketches, torch.no_grad():
        network(x, torch.zeros(2, 16))
        convolved = network.base_model.model.to_q(x)
    linear, conv = (next(s for n, s in sketches.items() if part in n) for part in ("to_q", "conv"))
    rows = x.flatten(0, 1).double()
    torch.testing.assert_close(linear.rows.T @ linear.rows, 2 * rows.T @ rows)
    rows = convolved.flatten(0, 1).double()
    torch.testing.assert_close(conv.rows.T @ conv.rows, rows.T @ rows)
    assert not any(module._forward_pre_hooks for module in network.modules())


def train(network: nn.Module, steps: int = 40) -> None:
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.02)
    for step in range(steps):
        x, text = inputs(True, 100 + step, count=8), seeded(8, 16, seed=step).float()
        target = x[..., WANTED + MARK].mean(1, keepdim=True) * torch.ones(6)
        optimizer.zero_grad()
        nn.functional.mse_loss(network(x, text), target).backward()
        optimizer.step()
        yield optimizer


def test_each_layer_stays_outside_its_own_subspace_and_text_outside_its_widths(tmp_path):
    network = lora_network()
    own, layers = fitted(network)
    factors = own | text_factors(network)
    text = subspace_of(16, 3)
    projection = Projection(factors, [text], layers=layers)
    assert len(factors) == 3
    projection.project_weights()
    for _ in train(network):
        projection.after_step()
        assert max(projection.residuals().values()) < 1e-6
    assert projection.check() < 1e-6
    for name, basis in layers.of(factors).items():
        rows = factors[name].detach().double().movedim(1, -1)
        assert (rows @ basis).norm() < 1e-6 * rows.norm()
        assert basis.shape[1]
    state = {name.replace("base_model.model.", "unet."): value.contiguous()
             for name, value in get_peft_model_state_dict(network).items()}  # fmt: skip
    save_file(state, tmp_path / "lora.safetensors")
    assert check_file(tmp_path / "lora.safetensors", [text], layers) < 1e-6
    free = lora_network()
    list(train(free))
    state = {name.replace("base_model.model.", "unet."): value.contiguous()
             for name, value in get_peft_model_state_dict(free).items()}  # fmt: skip
    save_file(state, tmp_path / "free.safetensors")
    with pytest.raises(ProjectionFailed, match="3 of 3"):
        check_file(tmp_path / "free.safetensors", [text], layers)


def test_the_lora_does_not_learn_what_its_layers_must_not_read():
    """The mark is a bias of every output: reading it lowers the loss, unless it cannot be read."""
    found = {}
    for projected in (False, True):
        network = lora_network()
        own, layers = fitted(network)
        projection = Projection(own if projected else {}, [], layers=layers if projected else None)
        projection.project_weights()
        for _ in train(network):
            projection.project_weights()
        mark = torch.zeros(1, 16, WIDTH)
        mark[..., WANTED + MARK] = 1
        linear = network.base_model.model.to_q
        delta = linear.get_delta_weight("default").detach()
        found[projected] = float((mark @ delta.T).norm() / delta.norm())
    assert found[True] < 0.2 * found[False]


def test_bases_of_different_ranks_are_one_stack():
    factors = {name: seeded(4, WIDTH, seed=place) for place, name in enumerate("abc")}
    bases = {"a": subspace_of(rank=2).basis, "b": subspace_of(rank=5, seed=3).basis,
             "c": ConceptSubspace.empty(WIDTH).basis}  # fmt: skip
    before = {name: factor.clone() for name, factor in factors.items()}
    Projection(factors, [], layers=LayerSubspaces(bases=bases)).project_weights()
    for name, basis in bases.items():
        expected = before[name] - before[name] @ basis @ basis.T
        torch.testing.assert_close(factors[name], expected)
    assert torch.equal(factors["c"], before["c"])


def test_names_are_found_in_every_dialect():
    basis = subspace_of().basis
    layers = LayerSubspaces(bases={"unet.mid_block.attn1.to_q": basis})
    for name in ("lora_unet_mid_block_attn1_to_q", "base_model.model.mid_block.attn1.to_q",
                 "mid_block.attn1.processor.to_q"):  # fmt: skip
        assert layers.of([name, "other"]) == {name: basis}
        projection = Projection({name: basis.T.clone()}, [], layers=layers)
        assert projection.residuals()[name] == pytest.approx(1)
    with pytest.raises(ValueError, match="1 layer is not there: unet"):
        layers.of(["mid_block.attn1.to_k"])


def test_a_file_gives_back_the_layers(tmp_path):
    _, layers = fitted(lora_network())
    path = tmp_path / "layers.safetensors"
    layers.save(path)
    loaded = LayerSubspaces.load(path)
    assert loaded.provenance == layers.provenance
    assert loaded.bases.keys() == layers.bases.keys()
    assert all(torch.equal(loaded.bases[name], layers.bases[name]) for name in layers.bases)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        LayerSubspaces.load(path)
    subspace_of().save(path)
    with pytest.raises(ModelError, match="no subspaces of layers"):
        LayerSubspaces.load(path)


def test_what_cannot_be_fitted_is_said():
    sketches = record(lora_network(), True)
    with pytest.raises(ValueError, match="no layer was recorded"):
        subspaces_from_sketches({}, {})
    with pytest.raises(ValueError, match="1 differ, first"):
        subspaces_from_sketches(sketches, dict(list(sketches.items())[:1]))
    narrow = LayerSubspaces(bases={"a": subspace_of(8, 2).basis})
    with pytest.raises(ValueError, match="its subspace is for 8"):
        Projection({"a": torch.zeros(2, WIDTH)}, [], layers=narrow)
    with pytest.raises(ValueError, match="a: `basis` must be orthonormal"):
        LayerSubspaces(bases={"a": torch.ones(4, 2, dtype=torch.float64)})


def test_a_network_is_run_at_levels_spread_over_its_schedule():
    denoiser = ToyDenoiser()
    seen = []
    denoise = denoiser.denoise
    denoiser.denoise = lambda x, sigma, cond: (
        seen.append((float(sigma), x)) or denoise(x, sigma, cond)
    )
    latents = torch.zeros(4, *denoiser.latent_shape)
    run_noisy(denoiser, latents, ["cat", "dog", "cat", "dog"], levels=3)
    assert len(seen) == 3
    assert [sigma for sigma, _ in seen] == sorted((s for s, _ in seen), reverse=True)
    for sigma, x in seen:
        assert torch.equal(x[:2], x[2:])  # both halves share their noise
        assert x.std() == pytest.approx(sigma, rel=0.5)
