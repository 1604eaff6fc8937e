"""Devices without float64, or where it is slow: the digits that matter are kept."""

import pytest
import torch
from small_text import CAPTIONS, ZORBO, seeded, subspace_of, text_path
from torch import nn
from toy import ToyDenoiser
from unmemorize.shared.score.metrics import text_noise_norm
from unmemorize.shared.training.concept.fitting import retained_energy
from unmemorize.shared.training.concept.text_states import TextStates, differences
from unmemorize.shared.training.layers.activations import Sketch
from unmemorize.shared.training.layers.regions import ConceptRegions, PlaceReader, fit_regions
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.shared.training.projection.projection import Projection
from unmemorize.shared.training.projection.removal import full_float32

APPLE = "mps:0"
WIDTH = 256


@pytest.fixture
def apple(foreign):
    return foreign(float64=False)


def test_what_is_measured_in_float64_comes_to_the_cpu_first(apple):
    def path(prompts):
        states = text_path(prompts)
        return TextStates(states=states.states.float().to(APPLE), words=states.words)

    rows = differences(path, ZORBO.pairs(holdout=False)[:3])
    assert rows.dtype == torch.float64
    assert rows.device.type == "cpu"
    assert retained_energy(path, CAPTIONS[:3]).rest.dtype == torch.float64
    sketch = Sketch(4, size=2)
    sketch.add(torch.ones(3, 4).to(APPLE))
    assert sketch.energy == 12


@pytest.mark.parametrize("elements", [1, 100, 16384, 20001])
def test_a_norm_keeps_its_digits_in_float32(apple, elements):
    cond = seeded(2, elements, dtype=torch.float32)
    exact = cond.double().norm(dim=1)
    norm = text_noise_norm(cond.to(APPLE), torch.zeros(2, elements).to(APPLE)).cpu()
    torch.testing.assert_close(norm.double(), exact, rtol=3e-7, atol=0)


@pytest.mark.parametrize("place", [APPLE, "cuda:1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_as_clear_as_their_dtype_can_say(foreign, place, dtype):
    """Products in float32: float64 takes 64 times as long on most GPUs, or is not there."""
    foreign(float64=False)
    subspace = subspace_of(WIDTH, 48)
    rows = seeded(4, WIDTH)
    # Nearly all of it is inside: what is rounded there is much of what stays.
    rows += 1000 * (rows @ subspace.basis) @ subspace.basis.T
    projection = Projection({"attn2_to_k": rows.to(dtype).to(place)}, [subspace])
    assert not projection.is_clear()
    projection.project_weights()
    assert projection.verify() < {torch.float32: 1e-7, torch.bfloat16: 1e-3}[dtype]


def test_factors_trained_in_float64_keep_it(foreign):
    foreign()
    factor = seeded(4, WIDTH).to("cuda:1")
    projection = Projection({"attn2_to_k": factor}, [subspace_of(WIDTH, 48)])
    projection.project_weights()
    assert projection.verify() < 1e-14


def test_autocast_and_tf32_stay_away_and_come_back():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            a = seeded(8, 8, dtype=torch.float32)
            with full_float32(torch.device("cpu")):
                assert (a @ a).dtype == torch.float32
                assert (
                    not matmul.allow_tf32
                    if not hasattr(matmul, "fp32_precision")
                    else (matmul.fp32_precision == "ieee")
                )
            assert (a @ a).dtype == torch.bfloat16
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


def test_whatever_layers_come_in_a_step_the_bases_take_the_same_memory(foreign):
    """Other modules drop out in each step; every new choice of them had its bases kept."""
    device = foreign()
    bases = [torch.linalg.qr(seeded(WIDTH, rank, seed=rank)).Q for rank in range(1, 9)]
    factors = {f"layer_{i}": seeded(4, WIDTH, seed=i, dtype=torch.float32).to("cuda:1")
               for i in range(8)}  # fmt: skip
    own = dict(zip(factors, bases, strict=True))
    projection = Projection(factors, [], layers=LayerSubspaces(bases=own))
    held = []
    for step in range(12):
        for place, factor in enumerate(factors.values()):
            factor.grad = factor * 1 if (step + 1) >> (place % 4) & 1 else None
        projection.project_gradients()
        for name, factor in factors.items():
            if factor.grad is not None:
                grad = factor.grad.cpu().double()
                assert (grad @ own[name]).norm() < 1e-6 * grad.norm()
            factor.grad = None
        held.append(device.held)
    assert len(set(held)) == 1


class OneLayer(nn.Module):
    """Reads places [image place width]."""

    def __init__(self):
        super().__init__()
        self.attn1_to_q = nn.Linear(4, 4)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.attn1_to_q(latents.flatten(2).mT)


def test_bases_of_regions_are_moved_once(apple):
    network = OneLayer().to(APPLE)
    basis = torch.linalg.qr(seeded(4, 2)).Q
    regions = ConceptRegions(
        bases={"attn1_to_q": basis}, centres={"attn1_to_q": torch.ones(2, dtype=torch.float64)},
        units={"attn1_to_q": 1.0}, limit=0.5, sigma=0.1,
    )  # fmt: skip
    latents = seeded(2, 4, 3, 3, dtype=torch.float32)
    there = latents.to(APPLE)
    read = regions.reader(network).read(network, there)["attn1_to_q"]
    expected = latents.flatten(2).mT @ basis.float() - 1
    torch.testing.assert_close(read.cpu(), expected)
    reader = regions.reader(network)
    moved = reader._bases["attn1_to_q"]
    assert moved.device == torch.device(APPLE)
    regions.shown(network, network, there)
    assert regions.reader(network) is reader
    assert reader._bases["attn1_to_q"] is moved
    with pytest.raises(ValueError, match="no layer attn1_to_k"):
        PlaceReader(network, {"attn1_to_k": basis})


class Drawing(ToyDenoiser):
    """A flow over one layer, on another device."""

    def __init__(self):
        super().__init__()
        self.network = OneLayer().to(APPLE)

    def denoise(self, x, sigma, cond):
        return self.network(x)


def test_regions_are_fitted_there(apple):
    denoiser = Drawing()
    basis = torch.linalg.qr(seeded(4, 2)).Q
    others = seeded(4, 4, 3, 3, dtype=torch.float32).to(APPLE)
    regions = fit_regions(denoiser, denoiser.network, {"attn1_to_q": basis}, others)
    assert regions is not None
    assert regions.centres["attn1_to_q"].dtype == torch.float64
