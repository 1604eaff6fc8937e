"""Which words of a prompt drive its score, as ComfyUI's tokenizers cut it up."""

import re
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
from ...shared.score.detection import detect
from ...shared.words.edits import Edit, apply, parse_edits
from ...shared.words.explanation import Explanation, Method, explain
from ...shared.words.leaving_out import leave_out, shortened
from .comfy_denoiser import ModelDenoiser, Prompt
from .measuring import encoded, forward_rows, with_denoiser

Piece = tuple[Any, float, int]
"""A token's id or its vector, its weight, and 0 where no text stands."""


EMPTIED = re.compile(r"\(\s*(?::[\d.]*)?\s*\)")
"""What is left of ``(word:1.2)`` without its word; ComfyUI would read it as text."""


@dataclass(frozen=True, kw_only=True)
class EditedPrompt:
    """A prompt with words struck or replaced, and its score."""

    prompt: str
    edits: tuple[Edit, ...]
    score_before: float
    """Of the prompt as typed (L2 norm, latent units)."""
    score_after: float

    def __str__(self) -> str:
        return (
            f"{', '.join(map(str, self.edits))}: the magnitude changes from "
            f"{self.score_before:.4g} to {self.score_after:.4g}"
        )


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What the node says of a prompt."""

    explanation: Explanation
    weights: tuple[float, ...]
    """What ComfyUI's ``(word:1.2)`` gives each word."""
    edited: EditedPrompt | None
    """None where nothing was edited."""


def explain_prompt(
    model: ModelPatcher,
    clip: Any,
    text: str,
    negative: list,
    latent: Mapping[str, Any],
    config: DetectionConfig,
    *,
    method: Method,
    most: int,
    edit: str,
    further: list,
) -> Explained:
    """Return what each word does to the score of a prompt, and what an edit does.

    Args:
        model: MODEL.
        clip: CLIP that encodes the text.
        text: As typed.
        negative: CONDITIONING that scores are measured against.
        latent: LATENT of the size to measure at.
        config: What to measure.
        method: "leave_out", which leaves every word out, or "encoder_gradient"; ComfyUI has
            text encoder and network in memory one after the other.
        most: How many of the strongest words are left out in turn after "encoder_gradient".
        edit: Edits of the text, one a line, as `parse_edits` takes them.
        further: Entries of a CONDITIONING that is averaged with the text.

    Raises:
        ValueError: An edit names no word of the text, or the method cannot find the words' tokens.
    """
    words, weights = prompt_words(clip.tokenizer, text)
    edits = parse_edits(edit, words)
    tidied = tidy if reads_weights(clip.tokenizer) else str
    edited = tidied(apply(text, words, edits)) if edits else text
    own, gradient = encoded(clip, text), None
    prompts = {text: Prompt(entries=own + further, words=words)}
    if method == "encoder_gradient":
        tokens = read_tokens(clip.tokenizer, text, words, own[0][0].shape[1])
        gradient = with_denoiser(
            model, {text: replace(prompts[text], tokens=tokens)}, negative, latent,
            lambda denoiser: explain(denoiser, text, config, method="encoder_gradient", occlude=0),
            forward_rows=2 * len(config.seeds) * config.steps, gradients=True,
        )  # fmt: skip
    tried = [*range(len(words))] if gradient is None else gradient.ranked[:most]
    shorter = shortened(text, words, tried)
    for rest in (*shorter.values(), edited):
        if rest not in prompts:
            prompts[rest] = Prompt(entries=encoded(clip, tidied(rest)) + further)

    def work(denoiser: ModelDenoiser) -> tuple[Explanation, EditedPrompt | None]:
        if gradient is None:
            found = explain(denoiser, text, config)
        else:
            occlusions = leave_out(denoiser, text, words, shorter, config)
            found = replace(gradient, occlusions=occlusions)
        if not edits:
            return found, None
        before, after = detect(denoiser, [text, edited], config).scores.tolist()
        return found, EditedPrompt(prompt=edited, edits=edits, score_before=before,
                                   score_after=after)  # fmt: skip

    explanation, changed = gradient, None
    if gradient is None or shorter or edits:
        rows = forward_rows(1 + len({*shorter.values()}), config) + 2 * (
            gradient is None
        )  # the map
        rows += forward_rows(2, config) if edits else 0
        explanation, changed = with_denoiser(
            model, prompts, negative, latent, work, forward_rows=rows
        )
    occlusions = tuple(replace(o, prompt=tidied(o.prompt)) for o in explanation.occlusions)
    return Explained(
        explanation=replace(explanation, occlusions=occlusions), weights=weights, edited=changed
    )


def mask_of(model: ModelPatcher, explanation: Explanation) -> Float[Tensor, "1 height width"]:
    """Return where the text acts, at the size of the image, 0 to 1: a MASK."""
    # Formats of before 2026 do not say; all of them have 8 pixels a place.
    scale = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
    unit = torch.from_numpy(unit_map(explanation.difference_map))[None, None]
    height, width = (side * scale for side in unit.shape[-2:])
    return comfy.utils.common_upscale(unit, width, height, "bilinear", "disabled")[0]


def reads_weights(tokenizer: Any) -> bool:
    """Return whether ``(word:1.2)`` is a weight; some language models get it as text."""
    chunks = tokenizer.tokenize_with_weights("(a:1.5)").values()
    return any(piece[1] != 1.0 for some in chunks for chunk in some for piece in chunk)


def prompt_words(tokenizer: Any, text: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the words that stand in the prompt, and their weights, without the weights' syntax.

    They come from the text alone: what a language model's chat template adds is no word.

    Args:
        tokenizer: Of a CLIP of ComfyUI: ``clip.tokenizer``.
        text: As typed, with weights, escaped parentheses and ``embedding:names``.
    """
    if not reads_weights(tokenizer):
        return tuple(text.split()), (1.0,) * len(text.split())
    segments = [
        (word.replace("\0\1", "\\)").replace("\0\2", "\\("), weight)
        for segment, weight in token_weights(escape_important(text), 1.0)
        for word in segment.split()
    ]
    return tuple(word for word, _ in segments), tuple(weight for _, weight in segments)


def tidy(text: str) -> str:
    """Return a prompt without weights that nothing bears any more: ``(:1.2)`` and ``()``."""
    while (shorter := EMPTIED.sub("", text)) != text:
        text = shorter
    return text


def read_tokens(
    tokenizer: Any, text: str, words: tuple[str, ...], positions: int
) -> tuple[Token, ...]:
    """Return which word of a prompt stands at each position of its embeddings.

    CLIP encoders stand side by side at the same positions. T5 follows them (SD3) or stands alone
    (Flux, which reads CLIP as a pooled vector): the number of positions decides which.

    Args:
        tokenizer: Of a CLIP of ComfyUI: ``clip.tokenizer``.
        text: As typed.
        words: Of the prompt.
        positions: Tokens of the embeddings.

    Raises:
        ValueError: It is not known where the words stand.
    """
    empty = tokenizer.tokenize_with_weights("", return_word_ids=True).values()
    if any(piece[2] for chunks in empty for chunk in chunks for piece in chunk):
        raise ValueError(
            "This text encoder is a language model with a chat template around the prompt: it is "
            "not known which word stands where. Choose the method leave_out, which need not know."
        )
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
            f"{len(t5)}: it is not known which word stands where. Choose the method leave_out, "
            "which need not know."
        )
    return tokens


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
