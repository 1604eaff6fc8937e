"""Which words of a prompt drive its score, as ComfyUI's tokenizers cut it up."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd1_clip import escape_important, token_weights

from ...shared.arrays import Float, Tensor
from ...shared.drawing.heatmap import unit_map
from ...shared.models.tokens import show, words_by_length
from ...shared.score.config import DetectionConfig
from ...shared.score.denoiser import Token
from ...shared.words.explanation import Explanation, explain, leave_out, shortened
from .comfy_denoiser import Prompt
from .measuring import encoded, forward_rows, with_denoiser

Piece = tuple[Any, float, int]
"""A token's id or its vector, its weight, and 0 where no text stands."""


@dataclass(frozen=True, kw_only=True)
class PromptWords:
    """A prompt as people read it, and as the network does."""

    words: tuple[str, ...]
    """In order, without the syntax of weights; each stands in the prompt as it is written here."""
    weights: tuple[float, ...]
    """What ComfyUI's ``(word:1.2)`` gives each word."""
    tokens: tuple[Token, ...]
    """What stands at each position of the embeddings, all chunks and encoders one after another."""


def explain_prompt(
    model: ModelPatcher,
    clip: Any,
    text: str,
    negative: list,
    latent: Mapping[str, Any],
    config: DetectionConfig,
    *,
    most: int,
    further: list,
) -> tuple[Explanation, PromptWords]:
    """Return what each word does to the score of a prompt, and the words with their weights.

    Args:
        model: MODEL.
        clip: CLIP that encodes the text.
        text: As typed.
        negative: CONDITIONING that scores are measured against.
        latent: LATENT of the size to measure at.
        config: What to measure.
        most: How many of the strongest words are left out in turn.
        further: Entries of a CONDITIONING that is averaged with the text.
    """
    own = encoded(clip, text)
    read = read_words(clip.tokenizer, text, own[0][0].shape[1])
    prompts = {text: Prompt(entries=own + further, tokens=read.tokens, words=read.words)}
    explanation = with_denoiser(
        model, prompts, negative, latent,
        lambda denoiser: explain(denoiser, text, config, occlude=0),
        forward_rows=2 * len(config.seeds) * config.steps, gradients=True,
    )  # fmt: skip
    if shorter := shortened(explanation, most):
        for rest in shorter.values():
            prompts.setdefault(rest, Prompt(entries=encoded(clip, rest) + further))
        occlusions = with_denoiser(
            model, prompts, negative, latent,
            lambda denoiser: leave_out(denoiser, explanation, shorter, config),
            forward_rows=forward_rows(1 + len(shorter), config),
        )  # fmt: skip
        explanation = replace(explanation, occlusions=occlusions)
    return explanation, read


def mask_of(model: ModelPatcher, explanation: Explanation) -> Float[Tensor, "1 height width"]:
    """Return where the text acts, at the size of the image, 0 to 1: a MASK."""
    # Formats of before 2026 do not say; all of them have 8 pixels a place.
    scale = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
    unit = torch.from_numpy(unit_map(explanation.difference_map))[None, None]
    height, width = (side * scale for side in unit.shape[-2:])
    return comfy.utils.common_upscale(unit, width, height, "bilinear", "disabled")[0]


def read_words(tokenizer: Any, text: str, positions: int) -> PromptWords:
    """Return the words of a prompt and where they stand in its embeddings.

    CLIP encoders stand side by side at the same positions. T5 follows them (SD3) or stands alone
    (Flux, which reads CLIP as a pooled vector): the number of positions decides which.

    Args:
        tokenizer: Of a CLIP of ComfyUI: ``clip.tokenizer``.
        text: As typed, with weights, escaped parentheses and ``embedding:names``.
        positions: Tokens of the embeddings.
    """
    segments = [
        (word.replace("\0\1", "\\)").replace("\0\2", "\\("), weight)
        for segment, weight in token_weights(escape_important(text), 1.0)
        for word in segment.split()
    ]
    words = tuple(word for word, _ in segments)
    read = {
        name: _read(_encoder(tokenizer, name), chunks, words)
        for name, chunks in tokenizer.tokenize_with_weights(text, return_word_ids=True).items()
    }
    clip = read.get("g") or read.get("l") or next(iter(read.values()))
    t5 = read.get("t5xxl", ())
    orders = (clip, t5, clip + t5) if "g" in read or not t5 else (t5, clip + t5, clip)
    tokens = next((order for order in orders if len(order) == positions), ())
    if not tokens:
        raise ValueError(
            f"The text encoder gave {positions} positions, its tokenizers {len(clip)} and "
            f"{len(t5)}: it is not known which word stands where."
        )
    return PromptWords(words=words, weights=tuple(w for _, w in segments), tokens=tokens)


def _encoder(tokenizer: Any, name: str) -> Any:
    """Return the tokenizer of one text encoder, e.g. "l" or "t5xxl"."""
    return getattr(tokenizer, f"clip_{name}", None) or getattr(tokenizer, name)


def _read(encoder: Any, chunks: list[list[Piece]], words: tuple[str, ...]) -> tuple[Token, ...]:
    """Return what stands at each position of one encoder, chunk after chunk."""
    pieces = [piece for chunk in chunks for piece in chunk]
    shown = [encoder.inv_vocab.get(p[0], "") if isinstance(p[0], int) else "" for p in pieces]
    read = [index for index, piece in enumerate(pieces) if piece[2]]
    # Tokenizers never merge across white space: each word alone gives its pieces of the whole.
    owners = [index for index, word in enumerate(words) for _ in range(_length(encoder, word))]
    if len(owners) != len(read):
        owners = words_by_length([shown[index] for index in read], words)
    owner = dict(zip(read, owners, strict=True))
    return tuple(Token(text=show(s), word=owner.get(i)) for i, s in enumerate(shown))


def _length(encoder: Any, word: str) -> int:
    """Return how many positions a word takes, one for each vector of an embedding."""
    if "\\" not in word:  # a parenthesis left over is text, not syntax
        word = word.replace("(", "\\(").replace(")", "\\)")
    chunks = encoder.tokenize_with_weights(word, return_word_ids=True)
    return sum(bool(piece[2]) for chunk in chunks for piece in chunk)
