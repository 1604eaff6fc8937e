"""Edits of a prompt by words and by comma-separated parts; everything else stays as typed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .leaving_out import without_word

Kind = Literal["drop", "replace", "reorder", "mixed"]

BRACKETS = ("()", "[]", "{}")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change of a prompt."""

    kind: Kind
    indices: tuple[int, ...]
    """Which words of the prompt it touches, from 0."""
    words: tuple[str, ...]
    """The same, as typed."""
    to: str = ""
    """What stands for the word, or where it moves: "end" or "start"."""
    part: bool = False
    """Moves whole comma-separated parts, the commas staying where they are."""

    def __str__(self) -> str:
        words = f"“{' '.join(self.words)}”"
        if self.kind == "drop":
            return f"drop {words}"
        if self.kind == "replace":
            return f"replace {words} with “{self.to}”"
        return f"move {words} to the {self.to}"


Plan = tuple[tuple[Edit, ...], str]
"""Edits and the prompt they make."""


def apply(prompt: str, words: Sequence[str], edits: Sequence[Edit]) -> str:
    """Return the prompt with single words dropped, replaced or moved, the rest as typed."""
    text, in_order = prompt, sorted(edits, key=lambda edit: edit.indices)
    for edit in reversed(in_order):  # what lies before a change stays where it was
        index = edit.indices[0]
        if edit.kind == "replace":
            start, _ = _spans(text, words[: index + 1])[index]
            first, last = core(words[index])
            text = text[: start + first] + edit.to + text[start + last :]
        else:
            text = without_word(text, words, index)
    for edit in in_order:
        if edit.kind == "reorder":
            text += f"{'' if not text or text[-1].isspace() else ' '}{edit.words[0]}"
    return text


def parse_edits(text: str, words: Sequence[str]) -> tuple[Edit, ...]:
    """Read edits as a person types them, one a line: ``word -> other words``, or ``word``.

    A word alone, or with nothing after its arrow, is dropped. It stands for all its occurrences, in
    any case and without the punctuation around it.

    Args:
        text: What was typed; empty lines count for nothing.
        words: Of the prompt.

    Raises:
        ValueError: The prompt has no such word, or two lines change the same one.
    """
    known = [{word.casefold(), word[slice(*core(word))].casefold()} for word in words]
    edits: dict[int, Edit] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        typed, _, to = (part.strip() for part in line.partition("->"))
        indices = [i for i, forms in enumerate(known) if typed.casefold() in forms]
        if not indices:
            raise ValueError(f"No word of the prompt is {typed!r}. Its words: {' '.join(words)}")
        for index in indices:
            if index in edits:
                raise ValueError(f"Two edits change the word {words[index]!r}.")
            kind: Kind = "replace" if to else "drop"
            edits[index] = Edit(kind=kind, indices=(index,), words=(words[index],), to=to)
    return tuple(edits[index] for index in sorted(edits))


def move_parts(prompt: str, words: Sequence[str]) -> list[Plan]:
    """Return the prompt with comma-separated parts moved round, fewest words first.

    Commas, white space and empty parts stay where they are. None when a bracket spans a comma.
    """
    pieces = prompt.split(",")
    parts = [piece.strip() for piece in pieces]
    places = [place for place, part in enumerate(parts) if part]
    if any(part.count(pair[0]) != part.count(pair[1]) for part in parts for pair in BRACKETS):
        return []
    owners = _owners(pieces, prompt, words)
    plans = []
    for first in range(1, len(places)):
        front, back = places[:first], places[first:]
        sides = [(tuple(sorted(set().union(*(owners[place] for place in side)))), to)
                 for side, to in ((front, "end"), (back, "start"))]  # fmt: skip
        indices, to = min(sides, key=lambda side: len(side[0]))
        moved = list(pieces)
        for place, source in zip(places, back + front, strict=True):
            moved[place] = pieces[place].replace(parts[place], parts[source])
        touched = tuple(words[index] for index in indices)
        edit = Edit(kind="reorder", indices=indices, words=touched, to=to, part=True)
        plans.append(((edit,), ",".join(moved)))
    return sorted(plans, key=lambda plan: len(plan[0][0].indices))


def core(word: str) -> tuple[int, int]:
    """Return where the letters of a word start and end; all of it when it has none."""
    letters = re.search(r"[^\W_]+(?:['\u2019-][^\W_]+)*", word)
    return letters.span() if letters else (0, len(word))


def _spans(prompt: str, words: Sequence[str]) -> list[tuple[int, int]]:
    """Return where each word starts and ends in the prompt."""
    spans, end = [], 0
    for word in words:
        start = prompt.index(word, end)
        end = start + len(word)
        spans.append((start, end))
    return spans


def _owners(pieces: Sequence[str], prompt: str, words: Sequence[str]) -> list[set[int]]:
    """Return the words that each comma-separated piece has letters of."""
    owners, start, where = [], 0, _spans(prompt, words)
    for piece in pieces:
        end = start + len(piece)
        owners.append({i for i, (first, last) in enumerate(where) if first < end and last > start})
        start = end + 1
    return owners
