"""A concept in words: its names in many sentences, each with a twin that does not name it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ...models.tokens import split_words

TEMPLATES = Path(__file__).parent / "templates.txt"
ARROW = "->"
"""Between a concept's names and its neutral word."""
PLACE = "{}"
"""Where a template takes the name."""
HOLDOUT = 4
"""One of so many templates is kept for the acceptance test."""


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
    """Word for any other thing of that sort, as "a character" for a character."""
    templates: tuple[str, ...] = field(default_factory=load_templates)
    """Sentences with one `{}` as a word of its own."""

    def __post_init__(self) -> None:
        if not self.names or not all(name.strip() for name in self.names):
            raise ValueError("`names` must hold at least one name, and none that is empty.")
        if not self.neutral.strip():
            raise ValueError("`neutral` must not be empty: name what sort of thing it is.")
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
        """Return every name in each template to learn from, or in each of the holdout."""
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
        """Return a prompt with its twin, which has the neutral word; None without a name."""
        named = named_words(self.names, prompt)
        if named is None:
            return None
        words, neutral = split_words(prompt), split_words(self.neutral)
        twin = " ".join([*words[: named.start], *neutral, *words[named.stop :]])
        other = range(named.start, named.start + len(neutral))
        return PromptPair(prompt=prompt, twin=twin, subject=named, twin_subject=other)


def parse_concepts(text: str, templates: Sequence[str] | None = None) -> tuple[Concept, ...]:
    """Return the concepts of "name, synonym -> neutral word; ...".

    Args:
        text: As a user types it.
        templates: Of all concepts; None takes the bundled ones.

    Raises:
        ValueError: A concept has no name or no neutral word.
    """
    concepts = []
    for part in filter(str.strip, text.split(";")):
        names, _, neutral = part.partition(ARROW)
        if not neutral.strip():
            raise ValueError(
                f"{part.strip()!r} has no neutral word: what the same sentence would say of any "
                f'other such thing. Type: "{names.strip()} {ARROW} a character"'
            )
        listed = tuple(name.strip() for name in names.split(",") if name.strip())
        sentences = load_templates() if templates is None else tuple(templates)
        concepts.append(Concept(names=listed, neutral=neutral.strip(), templates=sentences))
    return tuple(concepts)


def named_words(names: Sequence[str], text: str) -> range | None:
    """Return the words of a text at which the first of the names stands, None without any.

    A name must stand as words of its own; case and punctuation around words do not count. Of the
    names that start at the same word the longest is taken.
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
