"""The probe finds what a network knows, and nothing where it knows nothing."""

import math
from dataclasses import replace

import pytest
import torch
from toy import ToyDenoiser
from unmemorize.shared.mitigation.residual import CHECKS, residual_probe
from unmemorize.shared.score.denoiser import Conditioning, Denoiser
from unmemorize.shared.score.trajectory import PredictionError

WIDE = torch.float64


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Planted(Denoiser):
    """Draws one image for one embedding, the less surely the farther away the embedding is.

    Elsewhere it is the exact denoiser of images of pure Gaussian noise, which is what a network
    that learnt nothing else would be.
    """

    parametrization = "epsilon"
    guidance_distilled = False
    device = torch.device("cpu")
    dtype = WIDE
    latent_shape = (2, 4, 4)

    def __init__(self, parametrization: str = "epsilon"):
        self.parametrization = parametrization
        self.image, self.key = seeded(*self.latent_shape, seed=1), seeded(4, 6, seed=2)
        self.rows: list[int] = []

    def sigmas(self, steps):
        top = 1.0 if self.parametrization == "flow" else 14.0
        return torch.linspace(top, 0, steps + 1, dtype=WIDE)

    def denoise(self, x, sigma, cond):
        self.rows.append(len(x))
        distance = (cond.embeddings.to(WIDE) - self.key).square().mean((1, 2))
        sure = (1 / (1 + distance))[:, None, None, None]
        scale = 1 - sigma if self.parametrization == "flow" else torch.ones_like(sigma)
        vague = x * scale / (scale**2 + sigma**2)
        return sure * self.image + (1 - sure) * vague


def start(seed: int = 3, dtype: torch.dtype = WIDE) -> Conditioning:
    return Conditioning(embeddings=seeded(1, 4, 6, seed=seed).to(dtype), words=(("fox",),))


@pytest.mark.parametrize("parametrization", ["epsilon", "v_prediction", "flow"])
def test_a_planted_image_is_found_and_another_is_not(parametrization):
    network = Planted(parametrization)
    found = residual_probe(network, network.image, start=start(), generator=generator())
    # So far away, the network knows nothing of the image.
    far = replace(start(), embeddings=start().embeddings + 1e6)
    nothing = residual_probe(network, network.image, start=far, generator=generator(), iterations=1)
    assert found.loss_after < 0.02 * nothing.loss_before
    assert found.loss_after < 0.1 * found.loss_before
    x, sigma = 14 * seeded(1, *network.latent_shape, seed=9), network.sigmas(50)[0]
    drawn, untouched = (network.denoise(x, sigma, cond)[0] for cond in (found.cond, start()))
    assert (drawn - network.image).norm() < 0.1 * network.image.norm()
    assert (untouched - network.image).norm() > 0.3 * network.image.norm()
    # The negative control: the network never saw this image, and no embedding brings it.
    stranger = seeded(*network.latent_shape, seed=11)
    other = residual_probe(network, stranger, start=start(), generator=generator())
    nothing = residual_probe(network, stranger, start=far, generator=generator(), iterations=1)
    assert other.loss_after > 0.8 * nothing.loss_before


class Idle(Planted):
    """Answers with what it was given."""

    def denoise(self, x, sigma, cond):
        return x + 0 * cond.embeddings.sum()


@pytest.mark.parametrize(("parametrization", "expected"), [("epsilon", 1.0), ("flow", 10.0)])
def test_the_loss_is_in_units_of_the_noise(parametrization, expected):
    """|x - x0|^2 / sigma^2 is |noise|^2, and |noise - x0|^2 for flows."""
    network, target = Idle(parametrization), torch.full(Planted.latent_shape, 3.0, dtype=WIDE)
    found = residual_probe(
        network, target, start=start(), generator=generator(), iterations=1, draws=64
    )
    assert found.loss_before == pytest.approx(expected, rel=0.05)
    assert found.loss_after == found.loss_before


def slow_probe(toy, target, first, draw, *, iterations, lr, draws, steps):
    """Return embedding and losses: noise predictions, their mean error, one row at a time."""
    sigmas, errors = toy.sigmas(steps)[:-1], []
    leaf = first.embeddings.clone().requires_grad_()
    # Adam's epsilon weighs more against the gradient of a mean than against that of a sum.
    optimizer = torch.optim.Adam([leaf], lr=lr, eps=1e-8 / (draws * target.numel()))

    def loss_of(sigma, noises, embeddings):
        loss = 0
        for noise in noises:
            x = (target + sigma * noise)[None]
            x0 = toy.denoise(x, sigma, replace(first, embeddings=embeddings))
            predicted = (x - x0) / sigma
            loss = loss + (predicted[0] - noise).square().mean() / len(noises)
        return loss

    def noises():
        return torch.randn((draws, *target.shape), generator=draw).double()

    picks = [round((len(sigmas) - 1) * i / (CHECKS - 1)) for i in range(CHECKS)]
    checks = [(sigmas[i], noises()) for i in sorted(set(picks))]
    for _ in range(iterations):
        sigma = sigmas[int(torch.randint(len(sigmas), (), generator=draw))]
        loss = loss_of(sigma, noises(), leaf)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    with torch.no_grad():
        ends = [
            sum(loss_of(*check, embeddings).item() for check in checks) / len(checks)
            for embeddings in (first.embeddings, leaf)
        ]
    return leaf.detach(), errors, ends


@pytest.fixture(scope="module")
def toy() -> ToyDenoiser:
    return ToyDenoiser(WIDE, positions=5)


SETTINGS = {"iterations": 3, "lr": 0.1, "draws": 3, "schedule_steps": 20}


def test_matches_a_slow_reference_on_a_real_network(toy):
    target, first = seeded(4, 8, 8, seed=4), toy.encode(["red boat"])
    found = residual_probe(toy, target, start=first, generator=generator(), **SETTINGS)
    slow = {name.replace("schedule_steps", "steps"): value for name, value in SETTINGS.items()}
    embedding, errors, (before, after) = slow_probe(toy, target, first, generator(), **slow)
    torch.testing.assert_close(found.cond.embeddings, embedding)
    assert found.losses == pytest.approx(errors)
    assert (found.loss_before, found.loss_after) == pytest.approx((before, after))
    assert (found.cond.embeddings - first.embeddings).abs().max() > 0.1  # it moved


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_change_nothing(toy, batch_size):
    target, first = seeded(4, 8, 8, seed=4), toy.encode(["red boat"])
    whole = residual_probe(toy, target, start=first, generator=generator(), **SETTINGS)
    toy.rows.clear()
    split = residual_probe(
        toy, target, start=first, generator=generator(), batch_size=batch_size, **SETTINGS
    )
    assert max(toy.rows) == batch_size
    torch.testing.assert_close(split.cond.embeddings, whole.cond.embeddings)
    assert split.losses == pytest.approx(whole.losses)
    assert split.loss_after == pytest.approx(whole.loss_after)


def test_global_random_numbers_have_no_part_in_it():
    network, results = Planted(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found = residual_probe(
            network, network.image, start=start(), generator=generator(), iterations=5
        )
        assert torch.equal(torch.get_rng_state(), state)
        results.append(found)
    assert torch.equal(results[0].cond.embeddings, results[1].cond.embeddings)
    assert results[0].losses == results[1].losses
    other = residual_probe(
        network, network.image, start=start(), generator=generator(8), iterations=5
    )
    assert other.losses != results[0].losses  # the generator does


def test_the_start_and_the_network_stay_as_they_were(toy):
    first = toy.encode(["red boat"])
    pooled = seeded(1, 3)
    first = replace(first, pooled=pooled)
    before = first.embeddings.clone()
    found = residual_probe(
        toy, seeded(4, 8, 8), start=first, generator=generator(), iterations=1, draws=1
    )
    assert torch.equal(first.embeddings, before)
    assert all(parameter.grad is None for parameter in toy.unet.parameters())
    assert not found.cond.embeddings.requires_grad
    assert torch.equal(found.cond.pooled, pooled)
    assert (found.cond.tokens, found.cond.words) == (first.tokens, first.words)


class Pooled(Planted):
    """Reads the pooled text vector, too."""

    def denoise(self, x, sigma, cond):
        told = cond.embeddings.mean((1, 2)) * cond.pooled.mean(1)
        return super().denoise(x, sigma, cond) + told[:, None, None, None]


def test_embeddings_made_in_inference_mode_can_be_probed():
    network = Pooled()
    with torch.inference_mode():
        first = replace(start(), embeddings=seeded(1, 4, 6), pooled=seeded(1, 3))
    found = residual_probe(network, network.image, start=first, generator=generator(), iterations=2)
    assert math.isfinite(found.loss_after)


def test_a_half_precision_embedding_is_optimised_in_single():
    network, first = Planted(), start(dtype=torch.float16)
    # The largest step that float16 would swallow between 1 and 2, a hundred times.
    found = residual_probe(
        network, network.image, start=first, generator=generator(), iterations=100, lr=2e-4
    )
    assert found.cond.embeddings.dtype == torch.float16
    moved = (found.cond.embeddings - first.embeddings).abs()
    assert moved[first.embeddings.abs() > 1].median() > 0.01


class Broken(Planted):
    def denoise(self, x, sigma, cond):
        return super().denoise(x, sigma, cond) * torch.nan


def test_a_prediction_that_is_not_finite_is_an_error():
    network = Broken()
    with pytest.raises(PredictionError, match="residual probe or its gradient is not finite"):
        residual_probe(network, network.image, start=start(), generator=generator())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "`iterations` must be at least 1, got 0"),
        ({"draws": 0}, "`draws` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"lr": 0.0}, r"`lr` must be above 0 and finite, got 0\.0"),
        ({"lr": math.nan}, "`lr` must be above 0 and finite, got nan"),
        ({"target": torch.zeros(1, 2, 4, 4)}, r"shape \[1, 2, 4, 4\], expected .*\[2, 4, 4\]"),
        ({"start": start()[[0, 0]]}, r"must hold one prompt, got 2: choose one, `start\[\[0\]\]`"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    network = Planted()
    arguments = {"target": network.image, "start": start(), "generator": generator()} | change
    with pytest.raises(ValueError, match=message):
        residual_probe(network, **arguments)


def test_the_word_removed_stands_nowhere(root):
    assert (
        "removed"
        not in (root / "shared" / "mitigation" / "residual.py").read_text("utf-8").casefold()
    )
