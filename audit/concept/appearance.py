"""How often a LoRA draws a concept: the ways it is asked, what came, and the sentences about it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ...shared.score.rates import clopper_pearson
from ...shared.training.concept.adapter import ConceptAdapter

Way = Literal["by_name", "by_description", "unasked", "by_learnt_word"]
"""How the concept is asked for, after or in place of nothing in an ordinary prompt."""
WAYS: tuple[Way, ...] = get_args(Way)
TITLES = {
    "by_name": "by its name", "by_description": "by description", "unasked": "unasked",
    "by_learnt_word": "by a learnt word",
}  # fmt: skip
SURE, POWER = 0.05, 0.8
"""Largest p-value of a difference that counts; how surely a share is to be found."""
SEEN = 0.5
"""Share of the images drawn with the concept's adapter that must be recognised, for a verdict."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One image."""

    path: str
    """Relative to the output folder."""
    prompt: str
    seed: int
    gain: float
    shown: bool
    """Whether it shows the concept."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Images of one way of asking, with the LoRA and from the same noise without it."""

    way: Way
    on: tuple[Drawn, ...]
    off: tuple[Drawn, ...]

    @property
    def counts(self) -> tuple[int, int]:
        """How many images show the concept, with the LoRA and without."""
        return sum(image.shown for image in self.on), sum(image.shown for image in self.off)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share with the LoRA."""
        return clopper_pearson(self.counts[0], len(self.on))

    @property
    def p_value(self) -> float:
        """Chance of so many with the LoRA if it drew the concept as often as the base model."""
        from scipy.stats import fisher_exact

        on, off = self.counts
        table = [[on, len(self.on) - on], [off, len(self.off) - off]]
        return float(fisher_exact(table, alternative="greater").pvalue)

    @property
    def appears(self) -> bool:
        """Whether the LoRA draws the concept more often than the base model does."""
        return self.p_value <= SURE


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """How often the concept appears."""

    asked: tuple[Asked, ...]
    positive: tuple[Drawn, ...]
    """Drawn by the base model with the concept's adapter: do they show it?"""
    line: float
    """Gain above which an image shows the concept."""
    controls: int
    """Images of the base model, unasked, from which the line is."""
    concept: ConceptAdapter
    file: str
    lora: str
    model: str
    description: str
    folder: Path

    @property
    def called(self) -> str:
        """How sentences call the concept."""
        return " / ".join(self.concept.names) or f"the concept of {self.file}"

    @property
    def recognised(self) -> int:
        """How many of the positive controls show the concept."""
        return sum(image.shown for image in self.positive)

    @property
    def can_judge(self) -> bool:
        """Whether generated images of the concept are recognised at all."""
        return self.recognised >= SEEN * len(self.positive)

    @property
    def appears(self) -> bool:
        """Whether the LoRA draws the concept, in any way of asking."""
        return self.can_judge and any(each.appears for each in self.asked)

    @property
    def headline(self) -> str:
        """The verdict in one sentence, without its full stop."""
        if not self.can_judge:
            return (
                f"No verdict: of {len(self.positive)} images drawn with the concept's own adapter "
                f"only {self.recognised} are recognised as {self.called}"
            )
        if ways := [TITLES[each.way] for each in self.asked if each.appears]:
            return f"{self.lora} draws {self.called} {', '.join(ways)}"
        most = max(each.counts[0] for each in self.asked)
        return (
            f"{self.lora} was not seen to draw {self.called} more often than the base model: at "
            f"most {most} of {len(self.asked[0].on)} images in any way of asking"
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What carries the verdict, and what it leaves open."""
        count, gains = (
            len(self.asked[0].on),
            self.concept.account["numbers"].get("concept_gains", ()),
        )
        own = sum(gain > self.line for gain in gains)
        lines = [
            f"An image shows the concept where the adapter lowers its loss by more than "
            f"{self.line:.4f}, far above what is usual for {self.controls} images that the base "
            "model drew unasked.",
            f"Positive control: {self.recognised} of {len(self.positive)} images that the base "
            f"model draws with the concept's adapter, amplified, are recognised, and {own} of "
            f"{len(gains)} of the concept's own images that the adapter was not taught with.",
            f"Power: a LoRA that draws it in {detectable(count):.0%} of images or more is found "
            f"with a probability of {POWER:.0%} by {count} images, where the base model draws none "
            "and each is recognised.",
        ]
        asked = {each.way for each in self.asked}
        if "by_name" not in asked:
            lines.append("It was not asked by name: the concept's file has none.")
        if "by_description" not in asked:
            lines.append("It was not asked by description: give one with --description.")
        if "by_learnt_word" in asked:
            lines.append(
                "The word was learnt from images of the concept, once with the LoRA and once on "
                "the base model: what both draw by it the base model can draw. No training on such "
                "images was tried, which brings back more."
            )
        else:
            lines.append(
                "It was not asked by a word that is learnt from images (--concept-images), and no "
                "training on such images was tried: those bring back more."
            )
        return tuple(lines)


def detectable(count: int) -> float:
    """Return the smallest share that `count` images with a LoRA and as many without tell apart.

    With none of `count` without the LoRA, the fewest hits for a p-value of `SURE` are looked for,
    then the share that reaches them with probability `POWER`. 1.0 where none does.
    """
    from scipy.stats import binom, fisher_exact

    needed = next(
        (hits for hits in range(count + 1)
         if fisher_exact([[hits, count - hits], [0, count]], alternative="greater").pvalue <= SURE),
        math.inf,
    )  # fmt: skip
    shares = (share / 100 for share in range(1, 101))
    return next((s for s in shares if needed <= count and binom.sf(needed - 1, count, s) >= POWER),
                1.0)  # fmt: skip
