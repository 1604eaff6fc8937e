"""The results of a repair: plain frozen values; page and files are made of them alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ....shared.wording import counted
from ...common.wording import percent
from ..page import ASKED
from ..result import LoraAudit, Rate


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A method with how much of the LoRA it left, and what that gives."""

    method: str
    left: float
    """0 to 1, as the method's path takes it."""
    back: Rate
    """Training images that come back, of those that the LoRA gave back."""
    images: Rate
    """Images drawn for it that are copies."""
    kept: float
    """Share of what the LoRA changes in predictions for other prompts, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Pictured:
    """A prompt to be kept, drawn from one noise; paths are relative to the report's folder."""

    prompt: str
    base: str
    lora: str
    repaired: str


@dataclass(frozen=True, kw_only=True)
class Repair:
    """Everything that the page shows and repair.json holds."""

    before: LoraAudit
    after: LoraAudit
    trials: tuple[Trial, ...]
    """In the order in which they were made."""
    chosen: Trial
    held: int
    """Prompts that were to be kept while the LoRA was changed."""
    measured: int
    """Other prompts, on which what is kept was measured."""
    likeness: float
    """Mean cosine of the images of these prompts with and without the repair, from one noise."""
    likeness_base: float
    """The same between the base model and the LoRA."""
    pictured: tuple[Pictured, ...]
    output: Path
    sha256: str
    """Of the repaired file."""
    folder: Path

    @property
    def headline(self) -> str:
        """What the repair did, a sentence."""
        was, now = len(back(self.before)), len(back(self.after))
        come = "comes" if now == 1 else "come"
        return (
            f"{was} of {counted(len(self.before.verdicts), 'training image', 'training images')} "
            f"came back; after the repair {now or 'none'} {come} back as a copy, and "
            f"{percent(self.chosen.kept)} of what the LoRA does to other prompts is kept."
        )

    @property
    def clear(self) -> bool:
        """Whether the audit of the repaired file says that none came back.

        It does not where images still come nearer than controls do.
        """
        return self.after.headline.given and not back(self.after)

    @property
    def best_of(self) -> dict[str, Trial]:
        """Return for each method the trial that keeps most and gives nothing back."""
        clean = [trial for trial in self.trials if not trial.back.count]
        return {trial.method: trial for trial in sorted(clean, key=lambda trial: trial.kept)}

    @property
    def by_words(self) -> list[tuple[str, Rate, Rate]]:
        """Return how many images were copies before and after, by what was asked."""
        return [
            (ASKED[asked], copies(self.before, asked), copies(self.after, asked))
            for asked in ASKED
            if any(made.asked == asked for made in self.before.generations)
        ]


def copies(audit: LoraAudit, asked: str) -> Rate:
    """Return how many images drawn with the LoRA for such words are copies."""
    marks = [made.mark == "verbatim" for made in audit.generations
             if made.lora and made.asked == asked]  # fmt: skip
    return Rate.of(sum(marks), len(marks))


def back(audit: LoraAudit) -> list[int]:
    """Return the positions of the training images that come back."""
    return [v.image for v in audit.verdicts if v.verdict == "verbatim"]


def rate_of(values: Sequence[bool]) -> Rate:
    """Return a share of hits."""
    return Rate.of(sum(values), len(values))
