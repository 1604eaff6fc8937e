"""Which word of a prompt stands at which position of a text encoder, and what did not fit."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..score.denoiser import Token

WORD_MARKS = ("</w>", "\u2581")
"""End of a word in CLIP's vocabulary, start of one in SentencePiece's (T5)."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A prompt as one tokenizer cuts it up."""

    tokens: tuple[Token, ...]
    """One per position, special tokens and padding included."""
    first_cut: int
    """Index of the first word that is not read to its end; the number of words when all are."""


def split_words(prompt: str) -> tuple[str, ...]:
    """Return the words as typed: what stands between white space, punctuation attached."""
    return tuple(prompt.split())


def show(piece: str) -> str:
    """Return a piece of a vocabulary without its marks of a word's start or end."""
    for mark in WORD_MARKS:
        piece = piece.replace(mark, "")
    return piece


def words_by_length(pieces: Sequence[str], words: Sequence[str]) -> list[int | None]:
    """Return the word of each piece by counting characters, for text the tokenizer rewrote."""
    if not words:  # white space that the tokenizer reads as pieces
        return [None] * len(pieces)
    ends = list(accumulate(map(len, words)))
    owners: list[int | None] = []
    position = 0
    for piece in pieces:
        # Pieces beyond the last word's end belong to it.
        owners.append(min(bisect_right(ends, position), len(words) - 1))
        position += len(show(piece))
    return owners


def read(
    tokenizer: Any, prompt: str, length: int, convert: Callable[[str], str] = lambda text: text
) -> Reading:
    """Return what stands at each of the `length` positions of a text encoder.

    CLIP's and T5's tokenizers never merge across white space, so tokenizing word by word gives the
    same pieces as tokenizing the prompt, and each piece's word is known without parsing marks.
    Where that fails (a normalizer that rewrites white space), characters are counted instead.

    Args:
        tokenizer: Of transformers, slow or fast.
        prompt: Any text.
        length: Positions of the encoder, special tokens and padding included.
        convert: Applied to text first (textual inversion replaces a word by several tokens).
    """
    words = split_words(prompt)
    special = len(tokenizer("").input_ids)  # CLIP: start and end; T5: end
    start = special - 1
    whole = tokenizer(convert(prompt), add_special_tokens=False).input_ids
    parts = [convert(word) for word in words]
    each = tokenizer(parts, add_special_tokens=False).input_ids if parts else []
    owners: list[int | None] = [index for index, pieces in enumerate(each) for _ in pieces]
    if [piece for pieces in each for piece in pieces] != list(whole):
        owners = words_by_length(tokenizer.convert_ids_to_tokens(whole), words)
    room = max(0, length - special)
    cut = owners[room] if len(owners) > room else None
    padded = tokenizer(
        convert(prompt), padding="max_length", max_length=length, truncation=True
    ).input_ids
    shown = tokenizer.convert_ids_to_tokens(padded)
    placed = [None] * start + owners[:room]
    placed += [None] * (length - len(placed))
    tokens = tuple(Token(text=show(t), word=w) for t, w in zip(shown, placed, strict=True))
    return Reading(tokens=tokens, first_cut=len(words) if cut is None else cut)
