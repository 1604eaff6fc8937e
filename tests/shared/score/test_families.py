"""Families of captions: who is related, how often unrelated ones pass, and who is the member."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import WORDS
from unmemorize.shared.score.control_basis import ControlBasis, directions_for
from unmemorize.shared.score.families import (
    CONTROLS,
    PAIR_RATE,
    cosine_limit,
    near_members,
    overlap,
    related_pairs,
    sharing_words,
)


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ordinary(count: int, seed: int) -> torch.Tensor:
    """D of prompts like each other: many words in few directions, and noise of their own."""
    return rows(seed, count, 20) @ rows(99, 20, 200) * 3 + rows(seed + 1000, count, 200)


def wide_basis() -> ControlBasis:
    """A basis that computes in float64 and spans all words."""
    basis = ControlBasis.fit(ordinary(120, 0)[None], 20, [0])
    return replace(basis, mean=basis.mean.double(), directions=basis.directions.double())


@pytest.mark.parametrize(
    ("a", "b", "share"),
    [
        ("A red fox, on green!", "a red wolf on GREEN", 4 / 6),
        ("red fox", "red fox", 1),
        ("red red fox", "fox red", 1),
        ("one two", "one three", 1 / 3),
        ("", "", 0),
        ("!!", "??", 0),
        ("лиса на снегу", "Лиса на траве", 2 / 4),
    ],
)
def test_words_that_both_have_over_words_that_either_has(a, b, share):
    assert overlap(a, b) == overlap(b, a) == share


@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join), max_size=8))
def test_pairs_that_share_half_of_their_words_are_all_named(texts):
    pairs = itertools.combinations(range(len(texts)), 2)
    assert sharing_words(texts) == [(i, j) for i, j in pairs if overlap(texts[i], texts[j]) >= 0.5]


def test_cosines_are_those_of_a_slow_reference():
    basis, prompts = wide_basis(), rows(7, 6, 200)
    pairs = list(itertools.combinations(range(6), 2))
    measured = related_pairs(prompts, pairs, basis, limit=-2.0)
    mean, directions = basis.mean[0].numpy(), basis.directions[0].numpy()
    for i, j in pairs:
        first, second = (
            d - mean - sum(((d - mean) @ v) * v for v in directions)
            for d in (prompts[i].numpy(), prompts[j].numpy())
        )
        slow = first @ second / np.sqrt((first @ first) * (second @ second))
        assert measured[i, j] == pytest.approx(slow, rel=1e-12)
    above = related_pairs(prompts, pairs, basis, limit=0.05)
    assert above == {pair: value for pair, value in measured.items() if value > 0.05}


def test_what_controls_add_makes_nobody_related_and_what_else_is_shared_does():
    basis, words = wide_basis(), rows(99, 20, 200) * 3
    image = 30 * rows(5, 200) / rows(5, 200).norm()
    same_words = words[0] * 3 + rows(8, 2, 200)
    assert torch.corrcoef(same_words)[0, 1] > 0.95
    assert not related_pairs(same_words, [(0, 1)], basis, limit=0.5)
    assert related_pairs(same_words + image, [(0, 1)], basis, limit=0.5)
    # Only pairs that share words are looked at, however alike their D is.
    assert not related_pairs(same_words + image, [], basis, limit=0.5)


def test_a_prompt_that_adds_nothing_of_its_own_is_related_to_nobody():
    basis = wide_basis()
    prompts = torch.stack([basis.mean[0], basis.mean[0], rows(3, 200)])
    assert not related_pairs(prompts, [(0, 1), (0, 2)], basis, limit=0.0)


@pytest.mark.parametrize("controls", [CONTROLS, 100, 400])
def test_unrelated_prompts_exceed_the_limit_at_its_rate(controls):
    count, shares, naive = directions_for(controls), [], []
    first, second = torch.triu_indices(300, 300, offset=1)
    for draw in range(12):
        fitted = ordinary(controls, 10 * draw)
        basis = ControlBasis.fit(fitted[None], count, [0])

        def cosines(differences: torch.Tensor, basis: ControlBasis = basis) -> torch.Tensor:
            outside = basis.outside(differences, [0] * len(differences))
            unit = torch.nn.functional.normalize(outside, dim=1)
            return unit @ unit.T

        fresh = cosines(ordinary(300, 5000 + draw))[first, second]
        limit = cosine_limit(fitted, count)
        assert limit is not None
        shares.append((fresh > limit).double().mean().item())
        own = cosines(fitted)[torch.triu_indices(controls, controls, offset=1).unbind()]
        naive.append((fresh > own.double().quantile(1 - PAIR_RATE)).double().mean().item())
    assert np.mean(shares) < 1.5 * PAIR_RATE
    assert np.mean(naive) > np.mean(shares)  # what a basis of the controls' own would do


def test_pairs_of_controls_are_seen_in_a_basis_that_neither_made():
    """The slow way in float64, pair by pair, gives the same order statistic but for float32."""
    controls, count = ordinary(60, 3), 4
    cosines = []
    for i, j in itertools.combinations(range(60), 2):
        if i % 10 == j % 10:
            others = [k for k in range(60) if k % 10 != i % 10]
            mean = controls[others].mean(0)
            directions = torch.linalg.svd(controls[others] - mean).Vh[:count]
            centred = controls[[i, j]] - mean
            a, b = centred - centred @ directions.T @ directions
            cosines.append(float(a @ b / a.norm() / b.norm()))
    place = -(-(len(cosines) + 1) * 99 // 100)
    assert cosine_limit(controls, count) == pytest.approx(sorted(cosines)[place - 1], rel=1e-7)


def test_too_few_controls_give_no_limit():
    assert cosine_limit(ordinary(CONTROLS - 1, 0), 3) is None
    assert cosine_limit(ordinary(12, 0), 1) is None


def test_the_highest_score_is_the_member_of_its_family():
    related = {(0, 1): 0.9, (1, 2): 0.8, (0, 2): 0.7}
    assert near_members({0: 3.0, 1: 5.0, 2: 4.0, 3: 9.0}, related) == {0: 1, 2: 1}


def test_a_chain_makes_no_family_of_two_memorized_prompts():
    chain = {(0, 1): 0.8, (1, 2): 0.9}
    # The one in between is near the one that it resembles most; the ends stay two members.
    assert near_members({0: 9.0, 1: 1.0, 2: 8.0}, chain) == {1: 2}
    # Nor does a near prompt hand on what is related to it: the far end stands for itself.
    assert near_members({0: 9.0, 1: 8.0, 2: 1.0}, chain) == {1: 0}


def test_a_prompt_whose_own_image_came_back_is_a_member_whatever_it_is_related_to():
    related = {(0, 1): 0.99, (0, 2): 0.9, (1, 2): 0.8}
    scores = {0: 9.0, 1: 5.0, 2: 4.0}
    assert near_members(scores, related, {1}) == {0: 1, 2: 1}
    assert near_members(scores, related, {0, 1}) == {2: 0}
    assert near_members(scores, related, {0, 1, 2}) == {}


def test_equal_scores_and_equal_cosines_go_to_the_first():
    assert near_members({2: 1.0, 0: 1.0}, {(0, 2): 0.9}) == {2: 0}
    tied = {(0, 2): 0.9, (1, 2): 0.9}
    assert near_members({0: 5.0, 1: 5.0, 2: 1.0}, tied) == {2: 0}
    assert near_members({0: 4.0, 1: 5.0, 2: 1.0}, tied) == {2: 1}


GRAPHS = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 4).map(float), min_size=n, max_size=n),
        st.dictionaries(
            st.sampled_from([*itertools.combinations(range(n), 2)]) if n > 1 else st.nothing(),
            st.sampled_from([0.4, 0.6, 0.8]),
        ),
        st.sets(st.integers(0, n - 1)),
    )
)


@given(GRAPHS, st.randoms())
def test_families_are_stars(graph, random):
    scores, related, copied = graph
    near = near_members(dict(enumerate(scores)), related, copied)

    def rank(i: int) -> tuple:
        return i not in copied, -scores[i], i

    def cosine(i: int, j: int) -> float | None:
        return related.get((min(i, j), max(i, j)))

    members = set(range(len(scores))) - near.keys()
    assert copied <= members
    for i in range(len(scores)):
        before = [m for m in members if rank(m) < rank(i) and cosine(i, m) is not None]
        if i in members:  # nothing above it explains it
            assert i in copied or not before
        else:  # the most alike of those that do, the highest first where there are several
            assert near[i] == min(before, key=lambda m: (-cosine(i, m), rank(m)))
    shuffled = list(enumerate(scores))
    random.shuffle(shuffled)
    pairs = list(related.items())
    random.shuffle(pairs)
    assert near_members(dict(shuffled), dict(pairs), copied) == near
