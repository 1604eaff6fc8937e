"""A text path whose geometry is known: common words in one space, concepts with a part outside."""

import zlib
from collections.abc import Sequence

import torch
from unmemorize.shared.training.concept.concept import Concept
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.concept.text_states import TextStates

WIDTH, COMMON, POSITIONS = 64, 16, 20
MARKS = {"zorbo": 0, "zorb": 1, "quix": 2}
"""Names of concepts, and which direction outside the common space each adds to "thing"."""
ZORBO = Concept(names=("zorbo", "big zorb"), neutral="thing")
QUIX = Concept(names=("quix",), neutral="thing")
CAPTIONS = [
    f"{a} {b} {c}"
    for a, b in (("red", "house"), ("green", "tree"), ("old", "boat"), ("small", "dog"))
    for c in ("at night", "in the snow", "near a river", "by thing")
]


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def subspace_of(width: int = 24, rank: int = 5, seed: int = 7) -> ConceptSubspace:
    return ConceptSubspace(basis=torch.linalg.qr(seeded(width, rank, seed=seed)).Q)


AXES = torch.linalg.qr(seeded(WIDTH, WIDTH)).Q.T
"""Rows: the common space, then a direction per mark, then the first token's."""
FIRST = AXES[-1]


def word_vector(word: str) -> torch.Tensor:
    if word in MARKS:
        return word_vector("thing") + 6 * AXES[COMMON + MARKS[word]]
    return seeded(COMMON, seed=zlib.crc32(word.encode())) @ AXES[:COMMON] / COMMON**0.5


def states_of(prompt: str) -> tuple[torch.Tensor, tuple[int | None, ...]]:
    """Return a causal encoder's states: each token sees the words before it."""
    words = prompt.split()[: POSITIONS - 2]
    vectors = [word_vector(word) for word in words]
    seen, rows = torch.zeros(WIDTH, dtype=torch.float64), [30 * FIRST]
    for vector in vectors:
        seen = seen + vector / POSITIONS**0.5
        rows.append(vector + seen)
    end = word_vector("<end>")
    rows += [end + seen] * (POSITIONS - len(rows))
    indexes = (None, *range(len(words)), *(None,) * (POSITIONS - 1 - len(words)))
    return torch.stack(rows), indexes


def text_path(prompts: Sequence[str], scale: float = 1.0, parts: tuple[int, ...] = ()):
    """Return the states, those of the second encoder multiplied by `scale`."""
    rows = [states_of(prompt) for prompt in prompts]
    states = torch.stack([state for state, _ in rows])
    if parts:
        states = torch.cat([states[..., : parts[0]], scale * states[..., parts[0] :]], dim=-1)
    return TextStates(states=states, words=tuple(words for _, words in rows), encoders=parts)
