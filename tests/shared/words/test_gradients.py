"""Gradients against finite differences, at the encoder's output and at its input."""

from dataclasses import replace

import pytest
import torch
from toy import DifferentiableToy, ToyDenoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.denoiser import Token
from unmemorize.shared.score.detection import PredictionError, detect
from unmemorize.shared.score.metrics import text_noise_norm
from unmemorize.shared.words.explanation import explain
from unmemorize.shared.words.gradients import input_gradient, merge_into_words

CONFIG = DetectionConfig(seeds=(0, 2), steps=1, schedule_steps=5)


@pytest.fixture(scope="module")
def toy() -> ToyDenoiser:
    return ToyDenoiser()


def explained(network, prompt, config=CONFIG, occlude=0):
    return explain(network, prompt, config, method="encoder_gradient", occlude=occlude)


def slow_trajectory(toy: ToyDenoiser, prompt: str, config: DetectionConfig, seed: int):
    """Yield (x, sigma) of the guided trajectory of one seed, in noise predictions."""
    sigmas = toy.sigmas(config.schedule_steps)
    x = toy.initial_noise([seed], sigmas[0])
    cond, empty = toy.encode([prompt]), toy.unconditional()
    for step in range(config.steps):
        sigma = sigmas[step]
        yield x, sigma
        noise, noise_empty = ((x - toy.denoise(x, sigma, c)) / sigma for c in (cond, empty))
        guided = noise_empty + config.cond_scale * (noise - noise_empty)
        x = x - (sigma - sigmas[step + 1]) * guided


@pytest.mark.parametrize("steps", [1, 2])
@torch.no_grad()
def test_significance_matches_finite_differences(steps):
    toy = ToyDenoiser(torch.float64, positions=5)
    prompt, seeds, h = "red lighthouse", (0, 2), 1e-6
    config = DetectionConfig(seeds=seeds, steps=steps, schedule_steps=5)
    cond, empty = toy.encode([prompt]), toy.unconditional()
    expected = torch.zeros(5, dtype=torch.float64)
    for seed in seeds:
        for x, sigma in slow_trajectory(toy, prompt, config, seed):
            base = toy.denoise(x, sigma, empty)

            def magnitude(embeddings, x=x, sigma=sigma, base=base):
                rows = len(embeddings)
                x0 = toy.denoise(
                    x.repeat(rows, 1, 1, 1), sigma, replace(cond, embeddings=embeddings)
                )
                return text_noise_norm(x0, base.expand_as(x0)) / sigma

            bumps = h * torch.eye(5 * 16, dtype=torch.float64).view(-1, 5, 16)
            slopes = magnitude(cond.embeddings + bumps) - magnitude(cond.embeddings - bumps)
            expected += (slopes / (2 * h)).view(5, 16).norm(dim=1)
    expected /= len(seeds) * steps
    found = torch.tensor(explained(toy, prompt, config).token_significance)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)
    assert expected.min() > 1e-4  # the case is not trivial


@pytest.mark.parametrize("steps", [1, 2])
@torch.no_grad()
def test_input_gradient_matches_finite_differences(steps):
    toy = DifferentiableToy(torch.float64, positions=5)
    prompt, seeds, h = "red lighthouse", (0, 2), 1e-6
    config = DetectionConfig(seeds=seeds, steps=steps, schedule_steps=5)
    cond, empty = toy.encode([prompt]), toy.unconditional()
    bumps = h * torch.eye(5 * 16, dtype=torch.float64).view(-1, 5, 16)
    bumps = bumps + bumps.cumsum(1) / 5  # as the toy's text encoder mixes its input
    slope = torch.zeros(5 * 16, dtype=torch.float64)
    for seed in seeds:
        for x, sigma in slow_trajectory(toy, prompt, config, seed):
            base = toy.denoise(x, sigma, empty)
            ends = []
            for moved in (cond.embeddings + bumps, cond.embeddings - bumps):
                rows = len(moved)
                x0 = toy.denoise(x.repeat(rows, 1, 1, 1), sigma, replace(cond, embeddings=moved))
                ends.append(text_noise_norm(x0, base.expand_as(x0)) / sigma)
            slope += (ends[0] - ends[1]) / (2 * h)
    expected = (slope / (len(seeds) * steps)).view(5, 16).norm(dim=1)
    found = torch.tensor(input_gradient(toy, prompt, config).values, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    output = torch.tensor(explained(toy, prompt, config).token_significance, dtype=torch.float64)
    assert (found - output).abs().min() > 1e-5  # two different things


def test_words_hold_the_root_of_the_sum_of_squares_of_their_tokens(toy):
    found = explained(toy, "red strawberry")
    assert [t.text for t in found.tokens[:5]] == ["<start>", "red", "stra", "wber", "ry"]
    assert found.words == ("red", "strawberry")
    t = found.token_significance
    assert found.significance == pytest.approx((t[1], (t[2] ** 2 + t[3] ** 2 + t[4] ** 2) ** 0.5))


def test_merging_ignores_positions_without_a_word():
    tokens = [Token(text=str(w), word=w) for w in (None, 0, 2, 2, None)]
    assert merge_into_words(tokens, [9.0, 1.0, 3.0, 4.0, 9.0], 3) == [1.0, 0.0, 5.0]


class Deaf(ToyDenoiser):
    """Its network does not hear the token at one position."""

    deaf_at = 2

    def denoise(self, x, sigma, cond):
        heard = torch.ones(self.positions, 1)
        heard[self.deaf_at] = 0
        return super().denoise(x, sigma, replace(cond, embeddings=cond.embeddings * heard))


def test_a_token_the_network_ignores_has_no_significance():
    deaf, toy = (
        explained(network, "red boat near snow", occlude=4) for network in (Deaf(), ToyDenoiser())
    )
    assert deaf.significance[1] == 0
    assert deaf.token_significance[Deaf.deaf_at] == 0
    assert min(deaf.significance[0], *deaf.significance[2:]) > 0
    assert toy.significance[1] > 0  # the other network hears it
    assert "boat" not in {occlusion.word for occlusion in deaf.occlusions}


def test_words_that_were_cut_have_no_significance(toy):
    found = explained(toy, " ".join(["snow"] * 40))
    assert len(found.words) == len(found.significance) == 40
    assert min(found.significance[:10]) > 0
    assert set(found.significance[11:]) == {0.0}


def test_batches_of_seeds_change_nothing():
    toy = DifferentiableToy()
    config = DetectionConfig(seeds=(0, 1, 2), steps=2, schedule_steps=5)
    for method in ("input_gradient", "encoder_gradient"):
        together, apart = (
            explain(toy, "old dog", replace(config, batch_size=size), method=method, occlude=0)
            for size in (16, 1)
        )
        assert together.token_significance == pytest.approx(apart.token_significance, rel=1e-4)


def test_explaining_works_after_detecting_on_the_same_network():
    """Detection runs in inference mode; what it caches must not reach autograd."""

    class Caching(ToyDenoiser):
        kept = None

        def unconditional(self):
            self.kept = self.kept or super().unconditional()
            return self.kept

    toy = Caching()
    detect(toy, ["red boat"], CONFIG)
    assert explained(toy, "red boat").significance[0] > 0


def test_a_gradient_that_is_not_finite_names_the_prompt():
    class Broken(ToyDenoiser):
        def denoise(self, x, sigma, cond):
            return super().denoise(x, sigma, cond) * cond.embeddings.mean() * torch.nan

    with pytest.raises(PredictionError, match="prompt 'red boat' is not finite"):
        explained(Broken(), "red boat")
