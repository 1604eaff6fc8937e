"""Gradients against finite differences, negative controls, occlusion against detection."""

from dataclasses import replace

import pytest
import torch
from toy import ToyDenoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.denoiser import Token
from unmemorize.shared.score.detection import PredictionError, detect
from unmemorize.shared.score.metrics import text_noise_norm
from unmemorize.shared.words.explanation import (
    Explanation,
    Occlusion,
    explain,
    merge_into_words,
    without_word,
)

CONFIG = DetectionConfig(seeds=(0, 2), steps=1, schedule_steps=5)


@pytest.fixture(scope="module")
def toy() -> ToyDenoiser:
    return ToyDenoiser()


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
    found = torch.tensor(explain(toy, prompt, config, occlude=0).token_significance)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)
    assert expected.min() > 1e-4  # the case is not trivial


def test_words_hold_the_root_of_the_sum_of_squares_of_their_tokens(toy):
    found = explain(toy, "red strawberry", CONFIG)
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
        explain(network, "red boat near snow", CONFIG) for network in (Deaf(), ToyDenoiser())
    )
    assert deaf.significance[1] == 0
    assert deaf.token_significance[Deaf.deaf_at] == 0
    assert min(deaf.significance[0], *deaf.significance[2:]) > 0
    assert toy.significance[1] > 0  # the other network hears it
    assert "boat" not in {occlusion.word for occlusion in deaf.occlusions}


def test_occlusions_are_separate_detections_greatest_fall_first(toy):
    prompt = "old red lighthouse near snow"
    found = explain(toy, prompt, CONFIG, occlude=3)
    top = sorted(range(5), key=lambda i: -found.significance[i])[:3]
    assert {o.index for o in found.occlusions} == set(top)
    words = prompt.split()
    for o in found.occlusions:
        assert o.prompt == " ".join(words[: o.index] + words[o.index + 1 :])
        before, after = (detect(toy, [text], CONFIG).scores.item() for text in (prompt, o.prompt))
        assert (o.score_before, o.score_after) == pytest.approx((before, after), rel=1e-5)
    after = [o.score_after for o in found.occlusions]
    assert after == sorted(after)
    falling = [o for o in found.occlusions if o.score_after < o.score_before]
    assert found.suggestions == tuple(map(str, falling))


def test_only_words_that_lower_the_score_are_suggested():
    base = {"index": 0, "prompt": "", "score_before": 2.0}
    falls = Occlusion(word="fox", score_after=1.23456, **base)
    rises = Occlusion(word="cat", score_after=2.5, **base)
    explanation = Explanation(
        prompt="fox cat", words=("fox", "cat"), significance=(1.0, 1.0), tokens=(),
        token_significance=(), occlusions=(falls, rises), difference_map=torch.zeros(1, 1),
    )  # fmt: skip
    assert explanation.suggestions == ("without “fox” the score falls from 2 to 1.23",)


@pytest.mark.parametrize(
    ("prompt", "index", "expected"),
    [
        ("a red  cat", 1, "a  cat"),
        ("a red cat", 0, "red cat"),
        ("a red cat", 2, "a red"),
        ("cat", 0, ""),
        ("the cat, the hat", 2, "the cat, hat"),
        ("cat cats cat", 2, "cat cats"),
        ("cats cat", 1, "cats"),
        ("(a:1.2)\tb\nc", 1, "(a:1.2)\tc"),
        ("<b> & \u202e кот", 3, "<b> & \u202e"),
    ],
)
def test_removing_a_word_keeps_the_rest_as_typed(prompt, index, expected):
    assert without_word(prompt, prompt.split(), index) == expected


def test_a_word_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="'dog' is not in 'a cat'"):
        without_word("a cat", ["dog"], 0)


def test_a_single_word_and_none(toy):
    one = explain(toy, "lighthouse", CONFIG)
    assert [o.prompt for o in one.occlusions] == [""]
    assert one.occlusions[0].score_after < 1e-4 * one.occlusions[0].score_before
    assert one.suggestions[0].startswith("without “lighthouse” the score falls from")
    for prompt in ("", "  \n"):
        none = explain(toy, prompt, CONFIG)
        assert none.words == none.significance == none.occlusions == none.suggestions == ()


def test_words_that_were_cut_have_no_significance(toy):
    found = explain(toy, " ".join(["snow"] * 40), CONFIG)
    assert len(found.words) == len(found.significance) == 40
    assert min(found.significance[:10]) > 0
    assert set(found.significance[11:]) == {0.0}


def test_difference_map_belongs_to_the_first_seed_and_step(toy):
    found = explain(toy, "red boat", replace(CONFIG, steps=2))
    assert found.difference_map.shape == (8, 8)
    norm = found.difference_map.double().expm1().sum().sqrt().item()
    assert norm == pytest.approx(detect(toy, ["red boat"], CONFIG).traces[0, 0, 0].item(), rel=1e-4)


def test_batches_of_seeds_change_nothing(toy):
    config = DetectionConfig(seeds=(0, 1, 2), steps=2, schedule_steps=5)
    together, apart = (
        explain(toy, "old dog", replace(config, batch_size=size), occlude=0) for size in (16, 1)
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
    assert explain(toy, "red boat", CONFIG).significance[0] > 0


def test_a_gradient_that_is_not_finite_names_the_prompt():
    class Broken(ToyDenoiser):
        def denoise(self, x, sigma, cond):
            return super().denoise(x, sigma, cond) * cond.embeddings.mean() * torch.nan

    with pytest.raises(PredictionError, match="prompt 'red boat' is not finite"):
        explain(Broken(), "red boat", CONFIG)


def test_demo_model_is_explained_as_it_is_detected():
    from unmemorize.demo import MODEL
    from unmemorize.shared.models.load import load_denoiser

    denoiser, prompt = load_denoiser(MODEL, device="cpu"), "strawberry, red fruit"
    config = DetectionConfig(seeds=(0, 1))
    score = detect(denoiser, [prompt], config).scores.item()
    found = explain(denoiser, prompt, config)
    assert found.words == ("strawberry,", "red", "fruit")
    assert min(found.significance) > 0
    assert found.difference_map.shape == (16, 16)
    for o in found.occlusions:
        after = detect(denoiser, [o.prompt], config).scores.item()
        assert (o.score_before, o.score_after) == pytest.approx((score, after), rel=1e-5)
