"""One word of the prompt left out, where one word does it; the embedding moved where none does.

Of the words without which the prompt scores at or below the threshold, that one goes which changes
least of what the prompt asks for otherwise: of what it adds inside of what control prompts add. The
prompt stays as it was but for that word, and what is sampled is again a prompt that anybody can
read and type.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..arrays import Float, Tensor
from ..score.config import DetectionConfig
from ..score.denoiser import Conditioning, concatenate
from ..score.metrics import text_noise
from ..score.trajectory import automatic_rows
from ..wording import bare
from ..words.leaving_out import leave_out
from ..words.phrases import is_function_word, without_words
from .embedding import EmbeddingOptimisation
from .gate import ScoredNoises
from .method import Method, Mitigation, Start
from .ordinary import OrdinaryEmbedding

BY_RESIDUAL = OrdinaryEmbedding()
BY_MAGNITUDE = EmbeddingOptimisation()


@dataclass(frozen=True, kw_only=True)
class Reword(Method):
    """Leave out the word that changes least, of those without which the prompt scores as usual.

    What remains is a phrase (`without_words`). Change is measured inside the controls' subspace, at
    the score's own noises and told levels; where the calibration judges by magnitudes there is no
    subspace, and that word goes without which the magnitude stays highest. Where no single word
    brings the score to the threshold or below, and where the host has embeddings instead of
    prompts, the embedding is optimised: by the residual where the calibration judges by it, else by
    the magnitude.
    """

    name: ClassVar[str] = "reword"

    tried: int = 24
    """Words that are left out, one at a time, at least 0: of a prompt that has more, those whose
    removal moves the prediction most."""
    otherwise: Method = BY_RESIDUAL
    """What acts where no word does it and the calibration judges by the residual."""

    def __post_init__(self) -> None:
        if self.tried < 0:
            raise ValueError(f"`tried` must be at least 0, got {self.tried}.")

    def start(self, start: Start) -> Mitigation:
        """Return the conditioning of shorter prompts and moved embeddings.

        A prompt costs one row per word and seed of the calibration, and as many again for each of
        several words that would do.

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
                conds[row] = _like(without.cond, conds[row])
                changes[row] = f"without “{bare(without.word)}”: “{without.prompt}”"
        if left:
            method = BY_MAGNITUDE if start.noises is None else self.otherwise
            other = method.start(_only(start, left))
            for place, row in enumerate(left):
                if other.cond is not None:
                    conds[row] = other.cond[[place]]
                if other.changes:
                    changes[row] = other.changes[place]
        return Mitigation(cond=concatenate(conds), changes=tuple(changes))

    def _reworded(self, start: Start, prompt: str) -> "_Shorter | None":
        """Return the prompt without one word whose score is down, None if there is none."""
        if start.score is None or start.calibration is None:
            return None
        found = self._shorter(start, prompt)
        if not found:
            return None
        fits = found[0].cond.embeddings.shape[1:] == start.cond.embeddings.shape[1:]
        if not (fits or start.any_length):
            return None  # the host encodes to another length: it has no place for these
        scores = start.score(concatenate([each.cond for each in found]))
        assert scores is not None  # there is a calibration
        threshold = start.calibration.judge.threshold
        down = [(score, each) for score, each in zip(scores, found, strict=True)
                if score <= threshold]  # fmt: skip
        if not down:
            return None
        if start.noises is None or len(down) == 1:
            return max(down, key=lambda pair: pair[0])[1]
        every = [start.denoiser.encode([prompt]), *(each.cond for _, each in down)]
        inside = _inside(start.noises, concatenate(every))
        changes = torch.linalg.vector_norm(inside[1:] - inside[0], dim=2)
        in_medians = changes / start.noises.basis.median.exp().to(changes)
        return down[int(in_medians.mean(1).argmin())][1]

    def _shorter(self, start: Start, prompt: str) -> "list[_Shorter]":
        """Return the prompt without each of its words of content, in the order of the words."""
        words = start.denoiser.encode([prompt]).words[0]
        texts = {
            index: text for index, word in enumerate(words)
            if not is_function_word(word)
            and (text := without_words(prompt, words, {index})).strip()
        }  # fmt: skip
        if len(texts) > self.tried:
            seeds = tuple(start.calibration.settings["seeds"][:1]) if start.calibration else (0,)
            ranked = leave_out(start.denoiser, prompt, words, texts, DetectionConfig(seeds=seeds))
            kept = {each.index for each in ranked[: self.tried]}
            texts = {index: text for index, text in texts.items() if index in kept}
        if not texts:
            return []
        cond = start.denoiser.encode([*texts.values()])
        return [
            _Shorter(word=words[index], prompt=text, cond=cond[[place]])
            for place, (index, text) in enumerate(texts.items())
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Shorter:
    """A prompt without one of its words."""

    word: str
    prompt: str
    cond: Conditioning


@torch.no_grad()
def _inside(noises: ScoredNoises, cond: Conditioning) -> Float[Tensor, "prompt seed element"]:
    """Return what each prompt adds inside of what control prompts add."""
    size, parts = automatic_rows(noises.denoiser), []
    for seed, sigma in enumerate(noises.sigmas):
        for rows in torch.arange(len(cond)).split(size):
            seeds = [seed] * len(rows)
            x0 = noises.denoiser.denoise(noises.x[seeds], sigma, cond[rows.tolist()])
            added = text_noise(noises.x0_uncond[seeds], x0, sigma).flatten(1)
            parts.append(added - noises.basis.outside(added, seeds))
    return torch.cat(parts).view(len(noises.sigmas), len(cond), -1).transpose(0, 1)


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
