"""What becomes of a prediction when one word of the prompt is left out.

Words are ranked by the change of D, |D - D'|, D' without the word: all that the word does to the
prediction. By how far the magnitude falls, |D| - |D'|, is a worse order: another word may take over
what a word did, in another direction, and the magnitude stays. Neither needs controls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..arrays import Float, Tensor
from ..score.config import DetectionConfig
from ..score.denoiser import Denoiser
from ..score.detection import detect
from ..wording import bare

TELLING = 0.1
"""Share of the magnitude that a word's fall must be to be told in a sentence: a smaller fall at one
starting noise is more often a rise at another (``make bench NAME=words ARGS="--only falls"``)."""


@dataclass(frozen=True, kw_only=True)
class Occlusion:
    """What the score becomes when one word is left out."""

    word: str
    index: int
    """Which word of the prompt, from 0."""
    prompt: str
    """The prompt without it, the rest as typed."""
    change: float
    """|D - D'| at the first step, mean over seeds (L2 norm, latent units, >= 0)."""
    score_before: float
    """Magnitude: L2 norm, latent units, mean over seeds and steps."""
    score_after: float

    @property
    def fall(self) -> float:
        """Return how far the magnitude falls without the word (L2, latent units; < 0: it rises)."""
        return self.score_before - self.score_after

    @property
    def telling(self) -> bool:
        """Return whether the magnitude falls by more than another starting noise could undo."""
        return self.fall >= TELLING * self.score_before > 0

    def __str__(self) -> str:
        return (
            f"without “{bare(self.word)}” the magnitude falls from {self.score_before:.3g} "
            f"to {self.score_after:.3g}"
        )


def without_word(prompt: str, words: Sequence[str], index: int) -> str:
    """Return the prompt without its word `index` and one space beside it, the rest as typed.

    Raises:
        ValueError: The words do not follow each other in the prompt.
    """
    end = 0
    for word in words[: index + 1]:
        if (start := prompt.find(word, end)) < 0:
            raise ValueError(f"The word {word!r} is not in {prompt[:200]!r} where it should be.")
        end = start + len(word)
    before, after = prompt[:start], prompt[end:]
    if after[:1].isspace():
        return before + after[1:]
    return before[:-1] + after if before[-1:].isspace() else before + after


def shortened(prompt: str, words: Sequence[str], indices: Sequence[int]) -> dict[int, str]:
    """Return the prompt without one word, by that word's index, for each of `indices`."""
    return {index: without_word(prompt, words, index) for index in indices}


def leave_out(
    denoiser: Denoiser,
    prompt: str,
    words: Sequence[str],
    shorter: Mapping[int, str],
    config: DetectionConfig,
) -> tuple[Occlusion, ...]:
    """Score the prompt and its versions without one word, in one run of `detect`.

    Forward rows for one step: seeds * (2 + different shorter prompts), the empty prompt included.

    Args:
        denoiser: The network.
        prompt: Any string.
        words: Its words, in order.
        shorter: From `shortened`.
        config: Seeds and steps.

    Returns:
        Greatest change first.

    Raises:
        PredictionError: A prediction is NaN or infinite; names the prompt.
    """
    if not shorter:
        return ()
    ((occlusions, _),) = leave_out_each(denoiser, [(prompt, words, shorter)], config)
    return occlusions


def leave_out_each(
    denoiser: Denoiser,
    prompts: Sequence[tuple[str, Sequence[str], Mapping[int, str]]],
    config: DetectionConfig,
) -> list[tuple[tuple[Occlusion, ...], Float[Tensor, " seed element"]]]:
    """Score several prompts and their versions without one word in the same forward passes.

    Args:
        denoiser: The network.
        prompts: Prompt, words and shorter prompts of each, as `leave_out` takes them.
        config: Seeds and steps.

    Returns:
        Of each prompt the occlusions, greatest change first, and D of the first step.

    Raises:
        PredictionError: A prediction is NaN or infinite; names the prompt.
    """
    # Either "very" of "very very" leaves the same text.
    texts = list(dict.fromkeys(text for prompt, _, shorter in prompts
                               for text in (prompt, *shorter.values())))  # fmt: skip
    added: dict[int, Tensor] = {}
    found = detect(denoiser, texts, config, on_difference=added.__setitem__)
    scores = dict(zip(texts, found.scores.tolist(), strict=True))
    differences = {text: added[place] for place, text in enumerate(texts)}
    left_out = []
    for prompt, words, shorter in prompts:
        own = differences[prompt]
        occlusions = [
            Occlusion(
                word=words[index], index=index, prompt=text,
                change=torch.linalg.vector_norm(own - differences[text], dim=1).mean().item(),
                score_before=scores[prompt], score_after=scores[text],
            )
            for index, text in shorter.items()
        ]  # fmt: skip
        left_out.append((tuple(sorted(occlusions, key=lambda each: -each.change)), own))
    return left_out
