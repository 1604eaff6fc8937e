"""What may be said of each training image and of the whole LoRA.

One image that clearly came back is a finding by itself. That none did is a claim about all that was
not tried, and has the higher bar: the right words were asked, the instrument finds planted images
with as many seeds, and no image comes nearer with the LoRA than controls do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...shared.arrays import Float, Tensor
from ...shared.wording import counted
from ..common.copies import OTHERS
from ..common.wording import percent
from .result import Headline, ImageVerdict, PositiveControl, Rate, Thresholds, Verdict
from .rule import COPY, Marked

LEVEL = 0.05
"""p-value below which a difference from the controls is called one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What the verdicts rest on; columns are all images, held-out ones last."""

    matrix: Float[Tensor, "generation image"]
    """Cosines."""
    marked: Marked
    """Of the same generations and images; the first kind of features shows the arrangement, the
    second what is in it."""
    on: Sequence[int]
    """Generations with the LoRA, without the attack's."""
    off: Sequence[int]
    """The same prompts and seeds without the LoRA."""
    trained: int
    """Columns that were trained on, from the first."""
    held_out: Sequence[int]
    """Columns of images that were not, and that are no near-duplicates of one that was."""

    def copied(self, image: int, *, lora: bool) -> bool:
        """Return whether an image comes back from any words."""
        return bool((self.marked.marks[list(self.on if lora else self.off), image] == COPY).any())

    def near(self, image: int, *, lora: bool) -> Tensor:
        """Return for its own words which features have an image nearer than controls, [view]."""
        rows = list(self.on if lora else self.off)
        own = self.marked.own[rows, image]
        return (self.marked.alike[:, rows, image] & own).any(1)


def thresholds(count: int, trained: int, held_out: int) -> Thresholds:
    """Return how the verdicts' yardsticks were made.

    Args:
        count: What the yardstick with the fewest was taken from.
        trained: Training images.
        held_out: Images that were not trained on.
    """
    images = counted(trained, "training image", "training images")
    more = counted(held_out, "held-out image", "held-out images")
    method = (
        "Each image has a yardstick of its own: how near other captions' generations, the base "
        "model's and the other images come to it, near-duplicates left out. A copy is nearer "
        "than a fixed part of that, and nearer to it than to any other image. The yardsticks of "
        f"{images}{f' and {more}' if held_out else ''} rest on {count} controls or more each."
    )
    enough = count >= OTHERS
    if not enough:
        method = (
            f"{counted(count, 'control', 'controls')} cannot carry a verdict: {OTHERS} are needed. "
            f"Give {OTHERS - count} or more images of the same subject that were not trained on "
            "(--held-out), or draw more images of each prompt (--images-per-prompt)."
        )
    return Thresholds(method=method, controls=count, enough=enough)


def judge_images(
    evidence: Evidence, ceilings: Float[Tensor, " image"], *, enough: bool
) -> tuple[ImageVerdict, ...]:
    """Return the verdict of every image that was trained on.

    Args:
        evidence: Of the generations.
        ceilings: Cosine of each image and its autoencoder round trip.
        enough: Whether the controls carry a verdict.
    """
    on = evidence.matrix[list(evidence.on), : evidence.trained]
    off = evidence.matrix[list(evidence.off), : evidence.trained]
    attracted = torch.bincount(on.argmax(1), minlength=evidence.trained).tolist()
    verdicts = []
    for image in range(evidence.trained):
        verdict = _verdict(evidence, image) if enough else "none"
        # The generation to look at is one that made the verdict, and of these the most similar.
        marks = evidence.marked.marks[list(evidence.on), image]
        if verdict != "verbatim":
            marks = marks * evidence.marked.own[list(evidence.on), image]
        best = int((on[:, image] + 4 * marks * (verdict not in ("none", "base"))).argmax())
        verdicts.append(ImageVerdict(
            image=image, verdict=verdict, similarity=float(on[best, image]),
            control=float(off[:, image].amax()) if len(off) else -1.0,
            ceiling=float(ceilings[image]), generation=evidence.on[best],
            attracted=attracted[image],
            closeness=_closeness(evidence, image, evidence.on) if enough else None,
            closeness_off=_closeness(evidence, image, evidence.off) if enough else None,
        ))  # fmt: skip
    return tuple(verdicts)


def _verdict(evidence: Evidence, image: int) -> Verdict:
    """Return what an image's generations say, against its own with the LoRA off."""
    if evidence.copied(image, lora=False):
        return "base"
    if evidence.copied(image, lora=True):
        return "verbatim"
    layout, content = (evidence.near(image, lora=True) & ~evidence.near(image, lora=False)).tolist()
    if layout and not content:
        return "template"
    return "near" if content else "none"


def _closeness(evidence: Evidence, image: int, rows: Sequence[int]) -> float | None:
    own = [row for row in rows if evidence.marked.own[row, image]]
    values = evidence.marked.closeness[own or list(rows), image]
    return float(values.amin()) if len(values) else None


def summarize(
    verdicts: Sequence[ImageVerdict],
    evidence: Evidence,
    limits: Thresholds,
    instrument: PositiveControl,
    *,
    asked: str,
    doubt: str = "",
) -> Headline:
    """Return what may be said of the LoRA.

    Args:
        verdicts: Of the images that were trained on.
        evidence: They rest on.
        limits: Of the audit.
        instrument: Whether it works, and how many planted images it finds with as many seeds.
        asked: What the LoRA was asked, as in "None came back from ...".
        doubt: Why the words may not be those that were trained, a sentence; empty for no doubt.
    """
    n, counts = len(verdicts), [v.verdict for v in verdicts]
    copies, drawn = counts.count("verbatim"), counts.count("base")
    held = [evidence.copied(image, lora=True) for image in evidence.held_out]
    reproduced = Rate.of(copies, n)
    controls = Rate.of(drawn + sum(held), n + len(held))

    def headline(text: str, *, given: bool) -> Headline:
        p = fisher(copies, n, controls.count, controls.total)
        return Headline(text=text, given=given, reproduced=reproduced, controls=controls,
                        p_value=p if given and p < LEVEL else None)  # fmt: skip

    images = counted(n, "training image", "training images")
    own = _of_base(drawn)
    if not instrument.works:
        text = f"The instrument failed, so nothing can be said. {instrument.detail}"
        return headline(text, given=False)
    if not limits.enough:
        return headline(f"Not enough controls for a claim. {limits.method}", given=False)
    if copies:
        them = "it" if copies == 1 else "them"
        text = f"{copies} of {images} came back: look at {them}."
        if sum(held):
            others = counted(len(held), "held-out image", "held-out images")
            text += f" So did {sum(held)} of {others}, which the LoRA is said not to know."
        return headline(text + own, given=True)
    if nearer := counts.count("near") + counts.count("template"):
        come, them = ("comes", "it") if nearer == 1 else ("come", "them")
        return headline(
            f"No training image came back as a copy, but {nearer} of {n} {come} nearer with the "
            f"LoRA than controls do: look at {them}. That is no verdict of none.{own}",
            given=False,
        )
    if doubt:
        return headline(f"No training image came back, and that says nothing: {doubt}{own}",
                        given=False)  # fmt: skip
    found = instrument.found
    return headline(
        f"None of {images} came back from {asked}. With as many seeds the same rule finds "
        f"{found.count} of {found.total} images planted in the demo model; other words and seeds "
        f"leave room for up to {percent(reproduced.high)} of them (95 % interval).{own}",
        given=True,
    )


def _of_base(count: int) -> str:
    """Return a sentence about images that are the base model's, empty for none."""
    if not count:
        return ""
    are, it = ("is", "it is") if count == 1 else ("are", "they are")
    return f" {count} more {are} drawn by the base model without the LoRA: {it} the base model's."


def fisher(hits: int, n: int, control_hits: int, controls: int) -> float:
    """Return the chance of so many hits or more among the `n` if they were like the controls."""
    from scipy.stats import fisher_exact

    table = [[hits, n - hits], [control_hits, controls - control_hits]]
    return float(fisher_exact(table, alternative="greater").pvalue)
