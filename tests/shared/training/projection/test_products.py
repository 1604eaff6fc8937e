"""LoKr and LoHa: all of the weight's change leaves the subspace out, exactly, while it trains."""

import pytest
import torch
from lycoris.kohya import create_network
from safetensors.torch import load_file, save_file
from small_text import seeded, subspace_of
from torch import nn
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.training.projection.factors import (
    UnsupportedTraining,
    saved_state,
    text_factors,
)
from unmemorize.shared.training.projection.products import Products
from unmemorize.shared.training.projection.projection import (
    Projection,
    ProjectionFailed,
    check_file,
)

WIDTH, CAP = 48, 2


class Transformer2DModel(nn.Module):
    """Of the name by which LyCORIS finds the layers; they read text."""

    def __init__(self):
        super().__init__()
        self.attn2 = nn.ModuleDict({"to_k": nn.Linear(WIDTH, 36), "to_v": nn.Linear(WIDTH, 20)})

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.attn2["to_k"](text), self.attn2["to_v"](text).tanh()], -1)


KINDS = {
    "LoHa": {"algo": "loha"},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr, both factors split": {"algo": "lokr", "factor": 4, "decompose_both": True},
    "LoKr, whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "LoKr, with a scalar": {"algo": "lokr", "factor": 4, "use_scalar": True},
}


def network_of(kind: str, rank: int = 3) -> tuple[nn.Module, nn.Module]:
    """Return a real network of LyCORIS and the model that it changes."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": Transformer2DModel()}).requires_grad_(False)
    asked = {"preset": "attn-mlp", "factor": 4} | KINDS[kind]
    network = create_network(1.0, rank, 1.0, None, [], model, **asked)
    network.apply_to([], model, False, True)
    return network, model


def trained(kind: str, projected: bool):
    """Train the network for some steps of Adam, whose scaling of entries leaves any subspace."""
    network, model = network_of(kind)
    subspace = subspace_of(WIDTH, CAP)
    named = list(network.named_parameters())
    factors = text_factors(named)
    assert len(factors) == 2
    projection = Projection(factors, [subspace], products=Products.of(named, factors))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    if projected:
        projection.project_weights()
    for step in range(6):
        text, target = seeded(9, WIDTH, seed=step).float(), seeded(9, 56, seed=step).float()
        (model["block"](text) - target).square().mean().backward()
        if projected:
            projection.project_gradients()
        optimizer.step()
        optimizer.zero_grad()
        if projected:
            projection.after_step()
    return network, model, subspace, projection


def changes(network: nn.Module) -> list[torch.Tensor]:
    """Return the whole change of each layer's weight, by LyCORIS itself."""
    with torch.no_grad():
        return [each.get_diff_weight(1.0)[0].double() for each in network.unet_loras]


def largest_share(network: nn.Module, subspace) -> float:
    deltas = changes(network)
    assert min(delta.norm() for delta in deltas) > 0
    return max(float((delta @ subspace.basis).norm() / delta.norm()) for delta in deltas)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_change_leaves_the_subspace_out(kind, tmp_path):
    network, model, subspace, projection = trained(kind, True)
    assert largest_share(network, subspace) < 1e-6
    assert projection.check() < 1e-6
    inside = (subspace.basis @ seeded(CAP, 4)).T.float()
    before = model["block"](inside)
    network.restore() if hasattr(network, "restore") else network.set_multiplier(0.0)
    torch.testing.assert_close(before, model["block"](inside), rtol=1e-4, atol=1e-5)
    bare = trained(kind, False)
    assert largest_share(bare[0], subspace) > 0.05  # the case is not trivial
    with pytest.raises(ProjectionFailed):
        bare[3].verify()
    path = tmp_path / "lora.safetensors"
    for one, holds in ((network, True), (bare[0], False)):
        one.save_weights(str(path), torch.float32, {})
        if holds:
            assert check_file(path, [subspace]) < 1e-6
        else:
            with pytest.raises(ProjectionFailed, match="2 of 2"):
                check_file(path, [subspace])
    half = {key: value.half() for key, value in trained(kind, True)[0].state_dict().items()}
    save_file(half, path)
    assert check_file(path, [subspace]) < 1e-3


def test_an_empty_subspace_changes_no_bit():
    for kind in ("LoHa", "LoKr"):
        network, *_ = network_of(kind)
        named = list(network.named_parameters())
        before = [value.clone() for _, value in named]
        factors, empty = text_factors(named), subspace_of(WIDTH, CAP)
        empty = type(empty).empty(WIDTH)
        Projection(factors, [empty], products=Products.of(named, factors)).project_weights()
        assert all(torch.equal(x, y) for x, (_, y) in zip(before, named, strict=True))


@pytest.mark.parametrize(
    ("kind", "rank", "cap"), [("LoHa", 16, 3), ("LoKr", 3, 6)], ids=["LoHa", "LoKr"]
)
def test_where_nothing_would_be_learnt_the_training_is_refused(kind, rank, cap):
    network, _ = network_of(kind, rank)
    if kind == "LoKr":
        network, _ = network_of("LoKr", rank)
    named = list(network.named_parameters())
    factors = text_factors(named)
    products = Products.of(named, factors)
    with pytest.raises(UnsupportedTraining, match="nothing would be learnt"):
        Projection(factors, [subspace_of(WIDTH, cap)], products=products)
    assert Projection(factors, [subspace_of(WIDTH, 1)], products=products)


def test_dora_of_lycoris_is_refused_by_name():
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": Transformer2DModel()}).requires_grad_(False)
    network = create_network(
        1.0, 3, 1.0, None, [], model, algo="loha", preset="attn-mlp", dora_wd=True
    )
    network.apply_to([], model, False, True)
    with pytest.raises(UnsupportedTraining, match="DoRA"):
        text_factors(network)


def test_a_file_without_one_of_its_factors_is_refused(tmp_path):
    network, _ = network_of("LoKr")
    path = tmp_path / "lora.safetensors"
    network.save_weights(str(path), torch.float32, {})
    assert saved_state(path)
    state = load_file(path)
    save_file({k: v for k, v in state.items() if "lokr_w2" not in k}, path)
    with pytest.raises(ModelError, match="lack a LoRA factor"):
        saved_state(path)
