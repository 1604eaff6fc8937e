"""The smallest edit is found, verified, and said to be missing where there is none."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ToyDenoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.denoiser import Conditioning, Denoiser, Token
from unmemorize.shared.score.detection import detect
from unmemorize.shared.words.advice import Advice, advise
from unmemorize.shared.words.explanation import explain

CONFIG = DetectionConfig(seeds=(0, 2), schedule_steps=5)
LENGTH = 12


class Weighted(Denoiser):
    """A network whose score is the sum of its words' weights, times two for the first word."""

    parametrization = "epsilon"
    guidance_distilled = False
    device = torch.device("cpu")
    dtype = torch.float64
    latent_shape = (1, 2, 2)

    def __init__(self, weights: dict[str, float], first: float = 1.0):
        self.weights, self.first = weights, first
        self.batches: list[list[str]] = []

    def encode(self, prompts):
        self.batches.append(list(prompts))
        embeddings = torch.zeros(len(prompts), LENGTH, 2, dtype=self.dtype)
        tokens, words = [], []
        for row, prompt in enumerate(prompts):
            words.append(tuple(prompt.split()))
            for index, word in enumerate(words[-1]):
                weight = self.weights.get(word.strip(".,()"), 0.0)
                embeddings[row, index, 0] = weight**0.5
            texts = [*words[-1], *[""] * (LENGTH - len(words[-1]))]
            tokens.append(tuple(
                Token(text=text, word=i if text else None) for i, text in enumerate(texts)
            ))  # fmt: skip
        return Conditioning(embeddings=embeddings, tokens=tuple(tokens), words=tuple(words))

    def unconditional(self):
        return Conditioning(embeddings=torch.zeros(1, LENGTH, 2, dtype=self.dtype))

    def sigmas(self, steps):
        return torch.linspace(10, 0, steps + 1, dtype=self.dtype)

    def initial_noise(self, seeds, sigma):
        return torch.ones(len(seeds), *self.latent_shape, dtype=self.dtype) * sigma

    def denoise(self, x, sigma, cond):
        factor = torch.ones(LENGTH, dtype=self.dtype)
        factor[0] = self.first
        strength = (cond.embeddings[..., 0].square() * factor).sum(1)
        return x - sigma * strength.view(-1, 1, 1, 1) * 0.5  # the norm of four halves is 1


@pytest.fixture
def network() -> Weighted:
    return Weighted({"mona": 16, "lisa": 9, "museum": 4, "old": 1})


PROMPT = "mona  lisa in an old museum"


def test_the_network_of_these_tests_scores_as_it_says(network):
    found = detect(network, [PROMPT, "old", "in an"], CONFIG).scores
    torch.testing.assert_close(found, torch.tensor([30.0, 1.0, 0.0], dtype=torch.float64))


def test_one_word_is_enough(network):
    advice = advise(network, PROMPT, 15.0, CONFIG, replacements={})
    best = advice.best
    assert (best.prompt, best.kind, best.words, best.size) == (" lisa in an old museum", "drop",
                                                               ("mona",), 1)  # fmt: skip
    assert (best.score_before, best.score_after) == pytest.approx((30, 14))
    assert {found.size for found in advice.candidates} == {1}  # nothing larger was tried
    assert str(advice) == (
        "drop “mona”: the score changes from 30 to 14, not above the threshold, 15."
    )


def test_the_threshold_itself_is_not_above_it(network):
    assert advise(network, PROMPT, 14.0, CONFIG, replacements={}).best.size == 1
    assert advise(network, PROMPT, 13.9, CONFIG, replacements={}).best.size == 2


def test_two_words_where_one_is_not_enough(network):
    advice = advise(network, PROMPT, 6.0, CONFIG, replacements={})
    assert advice.best.prompt == " an old museum"  # not "in", which lost what it stood behind
    assert advice.best.words == ("mona", "lisa")
    assert advice.best.score_after == pytest.approx(5)
    sizes = [found.size for found in advice.candidates]
    assert sizes == sorted(sizes)
    assert set(sizes) == {1, 2}
    for _, group in itertools.groupby(advice.candidates, key=lambda found: found.size):
        scores = [found.score_after for found in group]
        assert scores == sorted(scores)


def test_the_most_promising_pair_goes_first(network):
    advice = advise(network, PROMPT, 6.0, CONFIG, replacements={}, budget=5)
    assert [found.size for found in advice.candidates] == [1] * 4 + [2]
    assert advice.best.words == ("mona", "lisa")


def test_nothing_is_found_and_said_so(network):
    advice = advise(network, PROMPT, 0.5, CONFIG, budget=7)
    assert advice.best is None
    assert len(advice.candidates) == 7
    assert str(advice).startswith(
        "None of the 7 edits tried brings the score to the threshold, 0.5. The lowest: drop “mona”"
    )
    none = advise(network, "in an", -1.0, CONFIG)  # words without any significance
    assert none.candidates == ()
    assert str(none) == "None of the 0 edits tried brings the score to the threshold, -1."


def test_a_prompt_under_the_threshold_is_left_alone(network):
    advice = advise(network, PROMPT, 30.0, CONFIG)
    assert (advice.candidates, advice.best) == ((), None)
    assert len(network.batches) == 1  # not even explained
    assert str(advice) == "Nothing has to change: the score, 30, is not above the threshold, 30."


def test_a_prompt_of_one_word_is_not_emptied(network):
    assert advise(network, "mona", 1.0, CONFIG).candidates == ()
    advice = advise(network, "mona", 1.0, CONFIG, replacements={"Mona": ["woman"]})
    assert [found.prompt for found in advice.candidates] == ["woman"]
    assert advice.best.kind == "replace"


@pytest.mark.parametrize(
    ("prompt", "offered"),
    [
        ("man bowing on teal", {"man bowing", "man on teal", "bowing on teal"}),
        (
            "mona on teal, a cat",
            {"mona, a cat", "teal, a cat", "mona on teal", "a cat, mona on teal"},
        ),
    ],
)
def test_what_is_offered_is_a_phrase(prompt, offered):
    """No "man bowing on thing", no "man bowing on", no "bowing on teal man"."""
    network = Weighted(dict.fromkeys(("man", "bowing", "teal", "mona", "cat", "on", "a"), 3.0))
    advice = advise(network, prompt, 0.1, CONFIG, largest=1)
    assert {found.prompt for found in advice.candidates} == offered


def test_where_a_word_stands_can_be_enough():
    network = Weighted({"mona": 5, "cat": 1}, first=2)
    advice = advise(network, "mona, cat snow", 7.5, CONFIG, replacements={})
    kinds = {found.prompt: found.kind for found in advice.candidates if found.under_threshold}
    assert kinds["cat snow, mona"] == "reorder"  # as a part, with its comma in place


def test_replacements_keep_punctuation_and_case_of_the_rest():
    network = Weighted({"Mona": 5, "cat": 1, "dog": 2})
    advice = advise(
        network, "A (Mona), cat", 3.0, CONFIG, replacements={"mONA": ["woman", "dog"], "x": ["y"]}
    )
    found = {c.prompt: (c.score_after, str(c.edits[0])) for c in advice.candidates
             if c.kind == "replace"}  # fmt: skip
    assert found == {
        "A (woman), cat": (pytest.approx(1), "replace “(Mona),” with “woman”"),
        "A (dog), cat": (pytest.approx(3), "replace “(Mona),” with “dog”"),
    }


def test_few_runs_no_duplicates_and_never_above_the_budget(network):
    counts = []
    others = {word: ["one", "two"] for word in PROMPT.split()}
    advice = advise(
        network, PROMPT, 0.1, CONFIG, budget=30, replacements=others, progress=counts.append
    )
    prompts = [found.prompt for found in advice.candidates]
    assert len(prompts) == 30
    assert len({tuple(text.split()) for text in [PROMPT, *prompts]}) == 31
    assert sum(counts) == 31
    # The prompt, its explanation's two, one run per size; a run encodes 16 or more at once.
    assert len(network.batches) <= 3 + 2 * 2


def test_an_explanation_that_is_there_is_not_made_again(network):
    known = explain(network, PROMPT, CONFIG)
    network.batches.clear()
    advice = advise(network, PROMPT, 15.0, CONFIG, explanation=known)
    assert network.batches[0] == [PROMPT]
    assert set(network.batches[1]) == {found.prompt for found in advice.candidates}
    other = replace(known, prompt="mona")
    with pytest.raises(ValueError, match="explanation is of 'mona', expected one of 'mona  lisa"):
        advise(network, PROMPT, 15.0, CONFIG, explanation=other)


def test_only_the_most_significant_words_are_touched(network):
    advice = advise(network, PROMPT, 0.1, CONFIG, top=3)
    touched = {word for found in advice.candidates for word in found.words}
    assert touched == {"mona", "lisa", "museum"}  # "old" stands before "museum"
    first = advise(network, "old museum lisa mona", 0.1, CONFIG, budget=1)
    assert first.candidates[0].words == ("mona",)


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.integers(1, 30), min_size=3, max_size=5, unique=True),
    share=st.floats(0.05, 0.95),
)
def test_the_smallest_drop_is_that_of_brute_force(weights, share):
    words = ["ash", "birch", "cedar", "elm", "fir"][: len(weights)]
    network = Weighted(dict(zip(words, map(float, weights), strict=True)))
    total = sum(weights)
    threshold = int(share * total) + 0.5  # between two possible scores
    rest = {
        kept: sum(weights[i] for i in kept)
        for size in range(1, len(words))
        for kept in itertools.combinations(range(len(words)), size)
    }
    enough = [kept for kept, left in rest.items() if left <= threshold]
    advice = advise(
        network, " ".join(words), threshold, CONFIG, replacements={}, largest=4, budget=200
    )
    assert advice.score == pytest.approx(total)
    if not enough:
        assert advice.best is None
        return
    smallest = max(map(len, enough))
    kept = min((k for k in enough if len(k) == smallest), key=rest.__getitem__)
    assert advice.best.size == len(words) - smallest
    assert advice.best.score_after == pytest.approx(rest[kept])


def test_every_score_is_that_of_a_separate_detection():
    toy = ToyDenoiser()
    prompt = "old red lighthouse, thick snow, one night"
    before = detect(toy, [prompt], CONFIG).scores.item()
    advice = advise(toy, prompt, 0.8 * before, CONFIG, budget=12)
    assert len(advice.candidates) >= 7
    for found in advice.candidates:
        after = detect(toy, [found.prompt], CONFIG).scores.item()
        assert found.score_after == pytest.approx(after, rel=1e-5)
        assert found.score_before == pytest.approx(before, rel=1e-5)
        assert found.under_threshold == (after <= 0.8 * before)
    assert len({found.score_after for found in advice.candidates}) > 5  # not one and the same


def test_long_parts_come_last_and_are_tried_all_the_same():
    prompt, settings = "mona b c, in an old museum", {"replacements": {}, "top": 1, "largest": 1}
    easy = Weighted({"mona": 5, "b": 1, "c": 1}, first=3)
    advice = advise(easy, prompt, 8.5, CONFIG, **settings)
    assert [found.size for found in advice.candidates] == [1]  # dropping "mona" is enough
    stubborn = Weighted({"mona": 5, "b": 5, "c": 5}, first=3)
    advice = advise(stubborn, prompt, 16.0, CONFIG, budget=4, **settings)
    assert [found.size for found in advice.candidates] == [1, 3]
    assert advice.best.prompt == "in an old museum, mona b c"
    assert advice.best.edits[0].part
    # A part of the budget is theirs.
    settings |= {"top": 3, "budget": 6}
    advice = advise(stubborn, prompt, 16.0, CONFIG, **settings)
    assert [found.size for found in advice.candidates] == [1] * 3 + [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "`budget` must be at least 1, got 0"),
        ({"top": 0}, "`top` must be at least 1, got 0"),
        ({"largest": 0}, "`largest` must be at least 1, got 0"),
        ({"threshold": float("nan")}, "`threshold` must be finite, got nan"),
        ({"replacements": {"cat": "animal"}}, "a list per word, got 'animal' for 'cat'"),
    ],
)
def test_wrong_arguments_are_refused(network, change, message):
    arguments = {"threshold": 1.0} | change
    with pytest.raises(ValueError, match=message):
        advise(network, PROMPT, config=CONFIG, **arguments)


def test_kinds_of_several_edits():
    network, others = Weighted({"x": 3.0, "y": 3.0}), {"x": ["z"], "y": ["z"]}
    mixed = advise(network, "x y c", -1.0, CONFIG, top=2, replacements=others)
    kinds = {found.kind for found in mixed.candidates if found.size == 2}
    assert kinds == {"drop", "replace", "mixed"}
    assert "z c" in {found.prompt for found in mixed.candidates if found.kind == "mixed"}
    assert isinstance(mixed, Advice)
