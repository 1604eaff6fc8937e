"""Explanation: which words of a prompt make its score high, and what their removal would do."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..arrays import Float, Tensor
from ..score.config import DetectionConfig
from ..score.denoiser import Conditioning, Denoiser, Token
from ..score.detection import Detection, detect
from ..score.metrics import difference_map, text_noise, text_noise_norm
from ..score.trajectory import (
    ROWS_OF_A_GRADIENT,
    automatic_rows,
    guided_step,
    loss_scale,
    not_finite,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Occlusion:
    """What the score becomes when one word is left out."""

    word: str
    index: int
    """Which word of the prompt, from 0."""
    prompt: str
    """The prompt without it, the rest as typed."""
    score_before: float
    """L2 norm, latent units, mean over seeds and steps."""
    score_after: float

    def __str__(self) -> str:
        return (
            f"without “{self.word}” the score falls from {self.score_before:.3g} "
            f"to {self.score_after:.3g}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Where in the prompt, and where in the latent, the text-conditional prediction comes from."""

    prompt: str
    words: tuple[str, ...]
    """As typed."""
    significance: tuple[float, ...]
    """Per word, gradient of |D|, L2 over its tokens (>= 0); 0 for words that were cut off."""
    tokens: tuple[Token, ...]
    """Per position of the embeddings."""
    token_significance: tuple[float, ...]
    """Per position, start, end and padding included."""
    occlusions: tuple[Occlusion, ...]
    """Of the most significant words, greatest fall of the score first."""
    difference_map: Float[Tensor, " *place"]
    """log(1 + D squared summed over channels) at the first seed and step, on the CPU."""

    @property
    def suggestions(self) -> tuple[str, ...]:
        """Return what leaving words out would do, for words whose removal lowers the score."""
        return tuple(str(o) for o in self.occlusions if o.score_after < o.score_before)


def explain(
    denoiser: Denoiser,
    prompt: str,
    config: DetectionConfig | None = None,
    *,
    occlude: int = 3,
) -> Explanation:
    """Explain the score of a prompt by gradients, and confirm it by leaving words out.

    Significance of a token: L2 norm of d|D| / d embedding, mean over seeds and steps, each at its
    point of the true trajectory (uncond + cond_scale * (cond - uncond)), which is held fixed; after
    Wen et al., ICLR 2024, arXiv:2407.21720, section 5. A gradient is local: a word of great
    significance need not lower the score when it goes. Therefore the occlusions.

    Args:
        denoiser: The network.
        prompt: Any string; one without words has an empty explanation.
        config: Seeds and steps, as in detection.
        occlude: How many of the most significant words are left out, one at a time.

    Raises:
        PredictionError: A prediction or gradient is NaN or infinite.
    """
    config = config or DetectionConfig()
    cond = denoiser.encode([prompt]).detached()
    tokens, words = (cond.tokens or ((),))[0], (cond.words or ((),))[0]
    significance, heat = _significance(denoiser, prompt, cond, config)
    explanation = Explanation(
        prompt=prompt,
        words=words,
        significance=tuple(merge_into_words(tokens, significance, len(words))),
        tokens=tokens,
        token_significance=tuple(significance),
        occlusions=(),
        difference_map=heat,
    )
    shorter = shortened(explanation, occlude)
    return replace(explanation, occlusions=leave_out(denoiser, explanation, shorter, config))


def merge_into_words(
    tokens: Sequence[Token], significance: Sequence[float], words: int
) -> list[float]:
    """Return per word the root of the sum of squares over its tokens, [word]."""
    squares = [0.0] * words
    for token, value in zip(tokens, significance, strict=True):
        if token.word is not None:
            squares[token.word] += value**2
    return [math.sqrt(square) for square in squares]


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


def shortened(explanation: Explanation, most: int) -> dict[int, str]:
    """Return the prompt without one word, by that word's index, for the most significant words."""
    prompt, words, significance = explanation.prompt, explanation.words, explanation.significance
    top = sorted(range(len(words)), key=lambda i: -significance[i])[:most]
    return {i: without_word(prompt, words, i) for i in top if significance[i] > 0}


def leave_out(
    denoiser: Denoiser,
    explanation: Explanation,
    shorter: Mapping[int, str],
    config: DetectionConfig,
) -> tuple[Occlusion, ...]:
    """Score the prompt and its versions without one word, in one run.

    Args:
        denoiser: The network.
        explanation: Of the prompt.
        shorter: From `shortened`.
        config: Seeds and steps, as in the explanation.

    Returns:
        Greatest fall of the score first.
    """
    if not shorter:
        return ()
    detection: Detection = detect(denoiser, [explanation.prompt, *shorter.values()], config)
    before, *after = detection.scores.tolist()
    occlusions = [
        Occlusion(
            word=explanation.words[i], index=i, prompt=text, score_before=before, score_after=score
        )
        for (i, text), score in zip(shorter.items(), after, strict=True)
    ]
    return tuple(sorted(occlusions, key=lambda occlusion: occlusion.score_after))


def _significance(
    denoiser: Denoiser, prompt: str, cond: Conditioning, config: DetectionConfig
) -> tuple[list[float], Tensor]:
    """Return the significance per token, mean over seeds and steps, and the difference map."""
    rows = max(1, (config.batch_size or automatic_rows(denoiser)) // ROWS_OF_A_GRADIENT)
    total, heat = torch.zeros(cond.embeddings.shape[1], dtype=torch.float64), None
    for start in range(0, len(config.seeds), rows):
        part = replace(config, seeds=config.seeds[start : start + rows])
        gradients, first = _gradients(denoiser, cond, part)
        total += gradients.sum((0, 1)).to("cpu", torch.float64)
        heat = first if heat is None else heat
    if not total.isfinite().all():
        raise not_finite(f"The gradient for the prompt {prompt[:200]!r}", denoiser)
    return (total / (len(config.seeds) * config.steps)).tolist(), heat


def _gradients(
    denoiser: Denoiser, cond: Conditioning, config: DetectionConfig
) -> tuple[Float[Tensor, " seed step token"], Tensor]:
    """Return |d|D| / d embedding_i| along the trajectory and the first seed's difference map."""
    seeds = len(config.seeds)
    many, empty = cond[[0] * seeds], denoiser.unconditional().detached()[[0] * seeds]
    cond_scale = 1.0 if denoiser.guidance_distilled else config.cond_scale
    sigmas = denoiser.sigmas(config.schedule_steps)
    x = denoiser.initial_noise(config.seeds, sigmas[0])
    scale = loss_scale(denoiser)
    gradients, heat = [], None
    for step in range(config.steps):
        sigma = sigmas[step]
        # The leaf is wide, so that its gradient is; the network gets its own dtype.
        leaf = many.embeddings.to(torch.promote_types(many.embeddings.dtype, torch.float32))
        leaf = leaf.detach().clone().requires_grad_()
        with torch.no_grad():
            x0_uncond = denoiser.denoise(x, sigma, empty)
        with torch.enable_grad():
            conditioning = replace(many, embeddings=leaf.to(many.embeddings.dtype))
            x0_cond = denoiser.denoise(x, sigma, conditioning)
            norms = text_noise_norm(x0_cond, x0_uncond) / sigma
            (gradient,) = torch.autograd.grad(scale * norms.sum(), leaf)
        gradients.append(gradient.norm(dim=2) / scale)
        x0_cond = x0_cond.detach()
        if heat is None:
            heat = difference_map(text_noise(x0_uncond[:1], x0_cond[:1], sigma))[0].cpu()
        if step + 1 < config.steps:
            x = guided_step(x, x0_uncond, x0_cond, sigma, sigmas[step + 1], cond_scale)
    return torch.stack(gradients, 1), heat
