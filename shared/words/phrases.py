"""Prompts with words left out that stay phrases: no comma gone, no preposition without its noun.

Grammar is not parsed. English function words are known, and what they need: a word after them that
they stood before, or a word of content. Other languages' are not known and count as content.
"""

import re
from collections.abc import Collection, Sequence

from .leaving_out import without_word

DETERMINERS = frozenset("a an the this that these those its his her their my your our".split())
JOINING = frozenset(
    "of in on at by with without from to into onto over under between behind near beside beneath "
    "below above across along around against through during inside outside toward towards upon for "
    "as like about after before and or but nor while".split()
)
"""Prepositions and conjunctions: a phrase does not begin with one unless it was typed so."""
SEPARATORS = ",;:.!?"


def is_function_word(word: str) -> bool:
    """Return whether a word alone says nothing: an English determiner, preposition, conjunction."""
    return _bare(word) in DETERMINERS | JOINING


def without_words(prompt: str, words: Sequence[str], gone: Collection[int]) -> str:
    """Return the prompt without some words, and without the function words that lose their own.

    Commas stay between what is left of both sides; the rest is as typed. Without ``teal`` of ``man
    bowing on teal, sky`` it is ``man bowing, sky``.

    Args:
        prompt: Any string.
        words: Its words, in order.
        gone: Which of them are left out, from 0.
    """
    parts = _parts(words)
    left = [_kept(words, part, gone) for part in parts]
    text, stays = prompt, set().union(*left)
    ends = {
        part[-1]: _separator(words[whole[-1]])
        for part, whole in zip(left, parts, strict=True) if part
    }  # fmt: skip
    if ends:  # the last part that is left ends the prompt
        ends[max(ends)] = _separator(words[-1])
    for index in range(len(words) - 1, -1, -1):  # what lies before a change stays where it was
        if index not in stays:
            text = without_word(text, words, index)
        elif index in ends and ends[index] != _separator(words[index]):
            end = _end(text, words, index)
            text = text[: end - len(_separator(words[index]))] + ends[index] + text[end:]
    return text


def _parts(words: Sequence[str]) -> list[list[int]]:
    """Return the words between separators."""
    parts: list[list[int]] = [[]]
    for index, word in enumerate(words):
        parts[-1].append(index)
        if _separator(word):
            parts.append([])
    return [part for part in parts if part]


def _kept(words: Sequence[str], part: Sequence[int], gone: Collection[int]) -> list[int]:
    """Return the words of a part that are left when those that lose their own go as well."""
    kept = [index for index in part if index not in gone]
    while True:
        following: list[int | None] = [*kept[1:], None]
        lost = {
            index
            for place, index in enumerate(kept)
            if index != part[-1] and not _served(words, index, following[place])
        }
        if kept and kept[0] != part[0] and _bare(words[kept[0]]) in JOINING:
            lost.add(kept[0])
        if not lost:
            return kept
        kept = [index for index in kept if index not in lost]


def _served(words: Sequence[str], index: int, after: int | None) -> bool:
    """Return whether a word still has after it what it needs."""
    bare = _bare(words[index])
    if not (is_function_word(words[index]) or bare.endswith(("'s", "\u2019s"))):
        return True
    return after is not None and (after == index + 1 or not is_function_word(words[after]))


def _separator(word: str) -> str:
    """Return the punctuation that a word ends in, empty for none."""
    return word[len(word.rstrip(SEPARATORS)) :]


def _end(text: str, words: Sequence[str], index: int) -> int:
    """Return where a word ends in the text."""
    end = 0
    for word in words[: index + 1]:
        end = text.index(word, end) + len(word)
    return end


def _bare(word: str) -> str:
    return re.sub(r"^[^\w]+|[^\w]+$", "", word).casefold()
