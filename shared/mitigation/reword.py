"""One word of the prompt left out, where one word does it; the embedding moved where none does.

Which words matter is measured by leaving them out: the change of the prediction, |D - D'|, ranks
them as the image follows them. The prompt stays as it was but for that word, and what is sampled is
again a prompt that anybody can read and type.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..score.config import DetectionConfig
from ..score.denoiser import Conditioning, concatenate
from ..wording import bare
from ..words.leaving_out import Occlusion, leave_out
from ..words.phrases import is_function_word, without_words
from .embedding import EmbeddingOptimisation
from .method import Method, Mitigation, Start
from .ordinary import OrdinaryEmbedding

BY_RESIDUAL = OrdinaryEmbedding()
BY_MAGNITUDE = EmbeddingOptimisation()
UNMOVED = "nothing: no word does it, and the run's own magnitude is at the target already"


@dataclass(frozen=True, kw_only=True)
class Reword(Method):
    """Leave out the word that moves the prediction most, if the prompt then scores as usual.

    What remains is a phrase (`without_words`). Where no single word brings the score to the
    calibration's threshold or below, and where the host has embeddings instead of prompts, the
    embedding is optimised: by the residual where the calibration judges by it, else by the
    magnitude.
    """

    name: ClassVar[str] = "reword"

    tried: int = 3
    """Words that are left out in turn, strongest first, at least 0."""
    otherwise: Method = BY_RESIDUAL
    """What acts where no word does it and the calibration judges by the residual."""

    def __post_init__(self) -> None:
        if self.tried < 0:
            raise ValueError(f"`tried` must be at least 0, got {self.tried}.")

    def start(self, start: Start) -> Mitigation:
        """Return the conditioning of shorter prompts and moved embeddings.

        A prompt costs one row per word, and one per seed of the calibration for each that is tried.

        Raises:
            ValueError: There is no calibration.
            PredictionError: A prediction or gradient is not finite.
        """
        found = {prompt: self._reworded(start, prompt) for prompt in dict.fromkeys(start.prompts)}
        shorter = [found.get(prompt) for prompt in start.prompts] or [None] * len(start.cond)
        left = [row for row, without in enumerate(shorter) if without is None]
        conds, changes = [start.cond[[row]] for row in range(len(shorter))], [""] * len(shorter)
        for row, without in enumerate(shorter):
            if without is not None:
                conds[row] = _like(start.denoiser.encode([without.prompt]), conds[row])
                changes[row] = f"without “{bare(without.word)}”: “{without.prompt}”"
        if left:
            method = BY_MAGNITUDE if start.noises is None else self.otherwise
            other = method.start(_only(start, left))
            for place, row in enumerate(left):
                if other.cond is not None:
                    before, conds[row] = conds[row].embeddings, other.cond[[place]]
                    moved = not torch.equal(conds[row].embeddings, before)
                    changes[row] = "the embedding" if moved else UNMOVED
                if other.changes:
                    changes[row] = other.changes[place]
        return Mitigation(cond=concatenate(conds), changes=tuple(changes))

    def _reworded(self, start: Start, prompt: str) -> Occlusion | None:
        """Return the strongest word without which the score is down, None if there is none."""
        if start.score is None or start.calibration is None:
            return None
        words = start.denoiser.encode([prompt]).words[0]
        shorter = {
            index: without_words(prompt, words, {index})
            for index, word in enumerate(words)
            if not is_function_word(word)
        }
        shorter = {index: text for index, text in shorter.items() if text.strip()}
        config = DetectionConfig(seeds=tuple(start.calibration.settings["seeds"][:1]))
        for left_out in leave_out(start.denoiser, prompt, words, shorter, config)[: self.tried]:
            cond = start.denoiser.encode([left_out.prompt])
            fits = cond.embeddings.shape[1:] == start.cond.embeddings.shape[1:]
            if not (fits or start.any_length):
                return None  # the host encodes to another length: it has no place for these
            scores = start.score(cond)
            if scores is not None and scores[0] <= start.calibration.judge.threshold:
                return left_out
        return None


def _only(start: Start, rows: Sequence[int]) -> Start:
    """Return a run with some of its images."""
    index = list(rows)
    return replace(
        start,
        cond=start.cond[index],
        x=start.x[index],
        x0_uncond=start.x0_uncond[index],
        prompts=tuple(start.prompts[row] for row in index if start.prompts),
    )


def _like(cond: Conditioning, other: Conditioning) -> Conditioning:
    """Return tensors alone, on the device and in the dtype of another conditioning."""
    pooled = cond.pooled
    if pooled is not None and other.pooled is not None:
        pooled = pooled.to(other.pooled)
    return Conditioning(
        embeddings=cond.embeddings.detach().to(other.embeddings), pooled=pooled,
        lengths=cond.lengths, others=cond.others,
    )  # fmt: skip
