"""Words left out against one detection each: batches change nothing, a deaf network nothing."""

import itertools
from dataclasses import replace

import pytest
import torch
from toy import ToyDenoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect
from unmemorize.shared.words.explanation import explain
from unmemorize.shared.words.leaving_out import leave_out, shortened, without_word

CONFIG = DetectionConfig(seeds=(0, 2), steps=1, schedule_steps=5)
PROMPT = "old red lighthouse near snow"


@pytest.fixture(scope="module")
def toy() -> ToyDenoiser:
    return ToyDenoiser(torch.float64)


def all_left_out(network, prompt, config=CONFIG):
    words = prompt.split()
    return leave_out(network, prompt, words, shortened(prompt, words, range(len(words))), config)


@pytest.mark.parametrize("steps", [1, 2])
def test_each_word_is_scored_as_its_shortened_prompt_alone(toy, steps):
    config = replace(CONFIG, steps=steps)
    found = all_left_out(toy, PROMPT, config)
    words = PROMPT.split()
    assert sorted(o.index for o in found) == list(range(5))
    for o in found:
        assert o.word == words[o.index]
        assert o.prompt == " ".join(words[: o.index] + words[o.index + 1 :])
        for text, score in ((PROMPT, o.score_before), (o.prompt, o.score_after)):
            alone = [
                detect(toy, [text], replace(config, seeds=(seed,), batch_size=1)).scores.item()
                for seed in config.seeds
            ]
            assert score == pytest.approx(sum(alone) / 2, rel=1e-12)
        assert o.fall == o.score_before - o.score_after
    changes = [o.change for o in found]
    assert changes == sorted(changes, reverse=True)
    assert max(o.fall for o in found) - min(o.fall for o in found) > 1e-3  # not trivial


def test_the_change_is_that_of_the_prediction_with_and_without_the_word(toy):
    sigma = toy.sigmas(CONFIG.schedule_steps)[0]
    for o in all_left_out(toy, PROMPT):
        apart = []
        for seed in CONFIG.seeds:
            x = toy.initial_noise([seed], sigma)
            with torch.no_grad():
                whole, rest = (toy.denoise(x, sigma, toy.encode([t])) for t in (PROMPT, o.prompt))
            apart.append(((whole - rest) / sigma).norm().item())
        assert o.change == pytest.approx(sum(apart) / 2, rel=1e-5)


def test_a_word_that_turns_the_prediction_counts_though_the_magnitude_stays():
    class Turning(ToyDenoiser):
        """One word moves the prediction along one axis, none or another word along another."""

        def encode(self, texts):
            cond = super().encode(texts)
            along = [[float("red" in t), float("red" not in t and t != "")] for t in texts]
            return replace(cond, pooled=torch.tensor(along).double())

        def denoise(self, x, sigma, cond):
            moved = torch.zeros_like(x)
            moved[:, 0, 0, :2] = cond.pooled.to(x)
            return moved

    found = all_left_out(Turning(torch.float64), "a red boat")
    assert found[0].word == "red"
    assert found[0].fall == pytest.approx(0)
    assert found[0].change > 0 == found[1].change


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_batches_change_nothing(toy, size):
    expected = {o.index: o.score_after for o in all_left_out(toy, PROMPT)}
    found = {
        o.index: o.score_after for o in all_left_out(toy, PROMPT, replace(CONFIG, batch_size=size))
    }
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_forward_row_a_word_and_seed(seeds):
    """And the empty and the whole prompt once a seed; equal shorter prompts are scored once."""
    config = DetectionConfig(seeds=tuple(range(seeds)), schedule_steps=5)
    for prompt, different in ((PROMPT, 5), ("very very red", 2)):
        toy = ToyDenoiser()
        all_left_out(toy, prompt, config)
        assert sum(toy.rows) == seeds * (2 + different)
        assert len(toy.rows) == 2  # batched over words


def test_a_network_that_ignores_text_has_no_effects():
    class Ignores(ToyDenoiser):
        def denoise(self, x, sigma, cond):
            same = self.unconditional().embeddings.expand_as(cond.embeddings)
            return super().denoise(x, sigma, replace(cond, embeddings=same))

    deaf = Ignores(torch.float64)
    assert [o.fall for o in all_left_out(deaf, PROMPT)] == [0.0] * 5
    found = explain(deaf, PROMPT, CONFIG)
    assert found.significance == (0.0,) * 5
    assert found.ranked == found.suggestions == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_the_same_words(toy, dtype):
    """Effects above rounding keep their order: the scores are widened before they are compared."""

    class Half(ToyDenoiser):
        def encode(self, prompts):
            cond = super().encode(prompts)
            return replace(cond, embeddings=cond.embeddings.to(self.half))

        def denoise(self, x, sigma, cond):
            wide = replace(cond, embeddings=cond.embeddings.to(self.dtype))
            timestep = (self.levels - sigma).abs().argmin()
            scaled = x / (1 + sigma**2).sqrt()
            noise = self.unet(scaled, timestep, wide.embeddings).sample.to(self.half)
            return x - sigma * noise.to(x)

    network = Half(torch.float64)
    network.half = dtype
    exact = {o.index: o.fall for o in all_left_out(toy, PROMPT)}
    rounded = {o.index: o.fall for o in all_left_out(network, PROMPT)}
    spread = max(exact.values()) - min(exact.values())
    error = max(abs(exact[i] - rounded[i]) for i in exact)
    assert 0 < error < 0.1 * spread
    for a, b in itertools.combinations(exact, 2):
        if abs(exact[a] - exact[b]) > 2 * error:
            assert (exact[a] > exact[b]) == (rounded[a] > rounded[b])


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
