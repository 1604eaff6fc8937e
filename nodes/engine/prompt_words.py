"""Which word of a prompt stands at which position, as ComfyUI's tokenizers cut it up."""

from dataclasses import dataclass
from typing import Any

from comfy.sd1_clip import escape_important, token_weights

from ...shared.models.tokens import show, words_by_length
from ...shared.score.denoiser import Token

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


def read_words(tokenizer: Any, text: str, positions: int) -> PromptWords:
    """Return the words of a prompt and where they stand in its embeddings.

    CLIP encoders stand side by side at the same positions. T5 follows them (SD3) or stands alone
    (Flux, which reads CLIP as a pooled vector): the number of positions tells which.

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
    shown = ["" if _is_vector(p[0]) else encoder.inv_vocab.get(p[0], "") for p in pieces]
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


def _is_vector(token: Any) -> bool:
    return not isinstance(token, int)
