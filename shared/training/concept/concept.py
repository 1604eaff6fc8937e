"""A concept in words: its names in many sentences, each with a twin that does not mean it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ...models.tokens import split_words

TEMPLATES = Path(__file__).parent / "templates.txt"
PLACE = "{}"
"""Where a template takes the name."""
HOLDOUT = 4
"""Every so many templates, one is kept for the acceptance test."""


@cache
def load_templates() -> tuple[str, ...]:
    """Return the bundled templates, 48 ordinary sentences with one place each."""
    lines = TEMPLATES.read_text("utf-8").splitlines()
    return tuple(line for line in lines if line)


@dataclass(frozen=True, kw_only=True)
class PromptPair:
    """One sentence about the concept and the same sentence about its neutral twin."""

    prompt: str
    twin: str
    subject: range
    """Words of `prompt` that name the concept."""
    twin_subject: range
    """Words of `twin` that stand in their place."""


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What a LoRA must not learn, by its names."""

    names: tuple[str, ...]
    """The name first, then synonyms and spellings; 5 to 20 of them make a good subspace."""
    neutral: str
    """What the same sentence would say of any other such thing, "a character" for a character."""
    templates: tuple[str, ...] = field(default_factory=load_templates)
    """Sentences with one `{}` as a word of its own."""

    def __post_init__(self):
        if not self.names or not all(name.strip() for name in self.names):
            raise ValueError("`names` must hold at least one name, and none that is empty.")
        if not self.neutral.strip():
            raise ValueError("`neutral` must not be empty: name the kind of thing it is.")
        if wrong := [line for line in self.templates if split_words(line).count(PLACE) != 1]:
            raise ValueError(
                f"Each of `templates` must hold {PLACE} once, with spaces around it; "
                f"{len(wrong)} do not, first {wrong[0]!r}."
            )
        if len(self.templates) < HOLDOUT:
            raise ValueError(
                f"`templates` must be at least {HOLDOUT}, got {len(self.templates)}: every "
                f"{HOLDOUT}th is held out to test the subspace."
            )
        same = {self.neutral.strip().lower()} & {name.strip().lower() for name in self.names}
        if same:
            raise ValueError(f"`neutral` must differ from every name, got {same.pop()!r} in both.")

    def pairs(self, *, holdout: bool) -> list[PromptPair]:
        """Return every name in the templates to learn from, or in those held out."""
        return [
            _pair(template, name.strip(), self.neutral.strip())
            for number, template in enumerate(self.templates, 1)
            if (number % HOLDOUT == 0) == holdout
            for name in self.names
        ]

    def is_named_in(self, caption: str) -> bool:
        """Return whether a caption holds one of the names as words of its own."""
        return named_words(self.names, caption) is not None

    def pair_of(self, prompt: str) -> PromptPair | None:
        """Return a prompt with the twin that says the neutral word instead; None without a name."""
        named = named_words(self.names, prompt)
        if named is None:
            return None
        words, neutral = split_words(prompt), split_words(self.neutral)
        twin = " ".join([*words[: named.start], *neutral, *words[named.stop :]])
        other = range(named.start, named.start + len(neutral))
        return PromptPair(prompt=prompt, twin=twin, subject=named, twin_subject=other)


def named_words(names: Sequence[str], text: str) -> range | None:
    """Return where the first of some names stands in a text, the longest of those that start there.

    Case and punctuation around words do not count; None where no name stands as words of its own.
    """
    words = [_bare(word) for word in split_words(text)]
    bare = [tuple(map(_bare, split_words(name))) for name in names]
    for start in range(len(words)):
        for name in sorted(bare, key=len, reverse=True):
            if any(name) and tuple(words[start : start + len(name)]) == name:
                return range(start, start + len(name))
    return None


def _pair(template: str, name: str, neutral: str) -> PromptPair:
    """Return the sentence with the name and the one with the neutral word."""
    before = split_words(template).index(PLACE)
    return PromptPair(
        prompt=template.replace(PLACE, name),
        twin=template.replace(PLACE, neutral),
        subject=range(before, before + len(split_words(name))),
        twin_subject=range(before, before + len(split_words(neutral))),
    )


def _bare(word: str) -> str:
    """Return a word in lower case without the punctuation around it."""
    return word.strip(".,;:!?()[]\"'").lower()
