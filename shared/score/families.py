"""Families of captions: flagged prompts that pull the network towards the same image.

The strongest false alarms of a detection are captions one word from a memorized one: they bring its
image too. Two flagged prompts are related when both hold:

*Words.* They share at least `HALF` of their words (Jaccard).
*Prediction.* The cosine of what each adds outside of what control prompts add (the residual D), at
one and the same starting noise, exceeds a limit that `PAIR_RATE` of the pairs of controls exceed.

A family is a star, not a chain: one member, taken for the memorized one, and prompts that are each
related to it. So a prompt between two memorized ones never makes them one family. The member is
found greedily from the highest score down, as in non-maximum suppression.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

import torch
from torch.nn.functional import normalize

from ..arrays import Float, Tensor
from .control_basis import FOLDS, ControlBasis
from .rates import controls_needed, upper_bound

HALF = 0.5
"""Share of the words that related prompts have in common, at least."""
PAIR_RATE = 0.01
"""Share of the pairs of unrelated prompts whose cosine may exceed the limit."""
CONTROLS = 50
"""Controls that such a limit takes: in ten folds of five they make 100 pairs."""

Pair = tuple[int, int]
"""Indices of two prompts, the smaller first."""


def words_of(text: str) -> frozenset[str]:
    """Return the words of a prompt in lower case, each once; punctuation does not count."""
    return frozenset(re.findall(r"\w+", text.lower()))


def overlap(a: str, b: str) -> float:
    """Return the share of two prompts' words that both have, 0..1 (Jaccard)."""
    first, second = words_of(a), words_of(b)
    return len(first & second) / max(1, len(first | second))


def unlike(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return the texts that share less than `HALF` of their words with each of the others."""
    return [text for text in texts if all(overlap(text, other) < HALF for other in others)]


def sharing_words(prompts: Sequence[str]) -> list[Pair]:
    """Return the pairs of prompts that share at least `HALF` of their words."""
    words = [words_of(prompt) for prompt in prompts]
    return [
        (i, j)
        for i, j in combinations(range(len(words)), 2)
        if 0 < len(words[i] | words[j]) * HALF <= len(words[i] & words[j])
    ]


def cosine_limit(differences: Float[Tensor, " control element"], count: int) -> float | None:
    """Return the cosine that a pair of unrelated prompts exceeds with probability `PAIR_RATE`.

    Controls are paired within their fold, where neither has made the basis that both are seen in:
    in a basis that one of them spans, its residual is too small and turned away from the others.
    Folds are spread over the list: neighbours in it may well be related.

    Args:
        differences: D of every control at one starting noise.
        count: Directions of the basis.

    Returns:
        An order statistic of the pairs' cosines; None with fewer controls than `CONTROLS`.
    """
    cosines, fold = [], torch.arange(len(differences)) % FOLDS
    for held in fold.unique():
        rows = differences[fold == held]
        basis = ControlBasis.fit(differences[None, fold != held], count, [0])
        unit = normalize(basis.outside(rows, [0] * len(rows)).double(), dim=1)
        first, second = torch.triu_indices(len(rows), len(rows), offset=1)
        cosines.append((unit @ unit.T)[first, second])
    pairs = torch.cat(cosines)
    return upper_bound(pairs, PAIR_RATE) if len(pairs) >= controls_needed(PAIR_RATE) else None


def related_pairs(
    differences: Float[Tensor, " prompt element"],
    pairs: Sequence[Pair],
    basis: ControlBasis,
    limit: float,
) -> dict[Pair, float]:
    """Return the pairs whose cosine of the residual D exceeds a limit, with that cosine, -1..1.

    Args:
        differences: D of every prompt at the first of the basis's starting noises.
        pairs: Of prompts that share words.
        basis: Of the controls.
        limit: From `cosine_limit`.
    """
    # One row at a time: a batch would copy the basis for each of its rows.
    outside = torch.cat([basis.outside(row[None], [0]) for row in differences])
    unit = normalize(outside.double(), dim=1)  # without any residual: 0, alike to nothing
    cosines = (unit @ unit.T).clamp(-1, 1).tolist()
    return {(i, j): cosines[i][j] for i, j in pairs if cosines[i][j] > limit}


def near_members(
    scores: Mapping[int, float], related: Mapping[Pair, float], copied: Collection[int] = ()
) -> dict[int, int]:
    """Return whom each prompt is near to; prompts that are missing there stand for themselves.

    Prompts are gone through from the highest score down, those in `copied` before all others, equal
    scores in their order. One that is in `copied`, or related to no member so far, becomes a
    member; any other is near the member whose cosine with it is highest.

    Args:
        scores: Of the flagged prompts.
        related: Cosines of the pairs of flagged prompts that are related.
        copied: Prompts whose own training image came back; they are never near another one.
    """
    cosines = {(j, i): cosine for (i, j), cosine in related.items()} | dict(related)
    members: list[int] = []
    near: dict[int, int] = {}
    for index in sorted(scores, key=lambda i: (i not in copied, -scores[i], i)):
        known = [member for member in members if (index, member) in cosines]
        if index in copied or not known:
            members.append(index)
        else:
            near[index] = max(known, key=lambda member: cosines[index, member])
    return near
