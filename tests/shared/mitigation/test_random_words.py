"""Random insertions: how many, where, and the same again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import start_of, wide_toy
from unmemorize.shared.mitigation.random_words import RandomInsertion, vocabulary

PROMPT = "a  red cat,\n<b> кот"


def changed(prompts, seed: int = 0, **settings) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return RandomInsertion(**settings).changed(prompts, generator)


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(max_size=20),
    seed=st.integers(0, 2**16),
    count=st.integers(1, 5),
)
def test_the_prompt_stays_in_order_and_only_insertions_come(prompt, seed, count):
    (text,) = changed([prompt], seed, count=count)
    rest, inserted = prompt.split(" ") if prompt else [], 0
    words = text.split(" ")
    assert len(words) == len(rest) + count
    known = set(vocabulary())
    for word in words:  # greedy matching finds a subsequence if there is one
        if rest and word == rest[0]:
            rest.pop(0)
        else:
            inserted += 1
            assert word in known
    assert not rest
    assert inserted == count


def test_runs_can_be_repeated_and_differ_by_seed():
    assert changed([PROMPT], 1) == changed([PROMPT], 1)
    assert len({changed([PROMPT], seed)[0] for seed in range(20)}) == 20


def test_a_prompt_does_not_depend_on_those_beside_it():
    together = changed(["a cat", PROMPT, "a cat", ""])
    assert changed([PROMPT]) == [together[1]]
    assert changed(["", PROMPT]) == [together[3], together[1]]
    assert changed(["a cat", "a cat"]) == [together[0], together[2]]
    assert together[0] != together[2]  # images of one prompt get their own words
    words = [set(text.split(" ")) for text in changed(["x", ""])]
    assert not words[1] <= words[0]  # and so do different prompts


def test_every_place_is_possible():
    places = {changed(["x y"], seed, count=1)[0].split(" ").index("x") for seed in range(40)}
    ends = {changed(["x y"], seed, count=1)[0].split(" ").index("y") for seed in range(40)}
    assert places == {0, 1}
    assert ends == {1, 2}


def test_the_changed_prompts_are_encoded():
    toy = wide_toy(positions=20)
    start = start_of(toy, ["red cat", "old boat"])
    found = RandomInsertion().start(start)
    start.generator.manual_seed(0)
    texts = RandomInsertion().changed(start.prompts, start.generator)
    assert torch.equal(found.cond.embeddings, toy.encode(texts).embeddings)
    assert not torch.equal(found.cond.embeddings, start.cond.embeddings)
    assert found.x is None


def test_no_insertion_changes_nothing():
    toy = wide_toy()
    start = start_of(toy, [PROMPT])
    assert RandomInsertion(count=0).start(start).cond is None
    assert changed([PROMPT], count=0) == [PROMPT]


def test_embeddings_without_prompts_are_refused():
    start = start_of(wide_toy())
    object.__setattr__(start, "prompts", ())
    with pytest.raises(ValueError, match="needs the prompts' text"):
        RandomInsertion().start(start)


def test_words_are_words():
    words = vocabulary()
    assert len(words) > 400
    assert list(words) == sorted(set(words))
    assert all(word.isalpha() and word.islower() for word in words)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="`count` must be at least 0"):
        RandomInsertion(count=-1)
