"""What may be said of each training image, and of the whole LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...shared.arrays import Float, Tensor
from ...shared.score.calibration import clopper_pearson
from ...shared.wording import counted
from ..common.wording import between, percent
from .result import Headline, ImageVerdict, PositiveControl, Rate, Thresholds, Verdict

LEVEL = 0.05
"""p-value below which a difference from the controls is called one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What the verdicts rest on; rows are generations, columns all images, held-out ones last."""

    matrix: Float[Tensor, "generation image"]
    """Cosines."""
    layouts: Float[Tensor, "generation image"]
    """Similarities of the arrangement, 0 to 1."""
    on: Sequence[int]
    """Generations with the LoRA; those of the attack are not among them."""
    off: Sequence[int]
    """The same prompts and seeds without it."""
    trained: int
    """Columns that were trained on, from the first."""

    def best(self, rows: Sequence[int]) -> Float[Tensor, " image"]:
        """Return the highest cosine of each image among some generations."""
        return self.matrix[list(rows)].amax(0)

    @property
    def layout_controls(self) -> Float[Tensor, " control"]:
        """Return the arrangements that controls reach: LoRA off, and held-out images."""
        off = self.layouts[list(self.off), : self.trained].amax(0)
        return torch.cat([off, self.layouts[list(self.on), self.trained :].amax(0)])

    @property
    def held_out(self) -> Float[Tensor, " control"]:
        """Return the highest cosine with the LoRA of each image it was not trained on."""
        return self.best(self.on)[self.trained :]


def judge_images(
    evidence: Evidence,
    ceilings: Float[Tensor, " image"],
    limits: Thresholds,
    layout_limit: float | None,
) -> tuple[ImageVerdict, ...]:
    """Return the verdict of every image that was trained on.

    Args:
        evidence: Of the generations.
        ceilings: Cosine of each image and its autoencoder round trip.
        limits: For cosines.
        layout_limit: For arrangements, as `near` is for cosines.
    """
    trained = evidence.trained
    on = evidence.matrix[list(evidence.on), :trained]
    layouts = evidence.layouts[list(evidence.on), :trained].amax(0).tolist()
    off = evidence.best(evidence.off)[:trained].tolist()
    attracted = torch.bincount(on.argmax(1), minlength=trained).tolist()
    best, rows = on.max(0)
    return tuple(
        ImageVerdict(
            image=image,
            verdict=_verdict(similarity, layouts[image], limits, layout_limit),
            similarity=similarity,
            control=off[image],
            ceiling=float(ceilings[image]),
            generation=evidence.on[row],
            attracted=attracted[image],
        )
        for image, (similarity, row) in enumerate(zip(best.tolist(), rows.tolist(), strict=True))
    )


def _verdict(
    similarity: float, layout: float, limits: Thresholds, layout_limit: float | None
) -> Verdict:
    if limits.near is None or limits.verbatim is None or similarity <= limits.near:
        return "none"
    if similarity > limits.verbatim:
        return "verbatim"
    return "template" if layout_limit is not None and layout > layout_limit else "near"


def rate(count: int, total: int) -> Rate:
    """Return a share with its interval; of nothing it is 0 to 1."""
    low, high = clopper_pearson(count, total) if total else (0.0, 1.0)
    return Rate(count=count, total=total, low=low, high=high)


def summarize(
    verdicts: Sequence[ImageVerdict],
    evidence: Evidence,
    limits: Thresholds,
    instrument: PositiveControl,
) -> Headline:
    """Return what may be said of the LoRA: images that come back, against controls that do.

    Controls are the same images against generations without the LoRA, and held-out images against
    generations with it. A claim needs Fisher's exact test below `LEVEL`.
    """
    copies = sum(verdict.verdict == "verbatim" for verdict in verdicts)
    found = rate(copies, len(verdicts))
    limit = limits.verbatim
    likened = torch.cat([evidence.best(evidence.off)[: evidence.trained], evidence.held_out])
    likely = 0 if limit is None else int((likened > limit).sum())
    controls = rate(likely, len(likened))

    def refused(text: str) -> Headline:
        return Headline(text=text, given=False, reproduced=found, controls=controls, p_value=None)

    if not instrument.works:
        return refused(f"The instrument failed, so nothing can be said. {instrument.detail}")
    if limit is None:
        return refused(f"Not enough controls for a claim. {limits.method}")
    p_value = fisher(copies, len(verdicts), likely, len(likened))
    images = counted(len(verdicts), "training image", "training images")
    if copies == 0:
        if (least := _least_images(len(likened))) > len(verdicts):
            return refused(
                f"No training image came back, but {len(verdicts)} could not have shown it: at "
                f"least {least} are needed beside {counted(len(likened), 'control', 'controls')}."
            )
        text = (
            f"None of {images} came back; for other prompts and seeds that leaves room for up to "
            f"{percent(found.high)} of them (95 % interval)."
        )
    elif p_value >= LEVEL:
        return refused(_undecided(copies, len(verdicts), likely, len(likened), p_value))
    else:
        text = (
            f"{copies} of {images} {'comes' if copies == 1 else 'come'} back "
            f"({between(found.low, found.high)}, 95 % interval), against {likely} of "
            f"{counted(len(likened), 'control', 'controls')}."
        )
    return Headline(text=text, given=True, reproduced=found, controls=controls, p_value=p_value)


def fisher(hits: int, n: int, control_hits: int, controls: int) -> float:
    """Return the chance of so many hits or more among the `n` if they were like the controls."""
    from scipy.stats import fisher_exact

    table = [[hits, n - hits], [control_hits, controls - control_hits]]
    return float(fisher_exact(table, alternative="greater").pvalue)


def _least_images(controls: int) -> int:
    """Return how many images could show a difference at all if every one of them came back."""
    return next(n for n in range(1, 1000) if fisher(n, n, 0, controls) < LEVEL)


def _undecided(copies: int, n: int, control_hits: int, controls: int, p_value: float) -> str:
    """Say what came back, why that is no claim, and how many controls would make it one."""
    came = f"{copies} of {counted(n, 'training image', 'training images')} came back"
    against = counted(controls, "control", "controls")
    if control_hits:
        return (
            f"{came}, and so did {control_hits} of {against}: no difference that chance would not "
            f"make (p = {p_value:.2g})."
        )
    more = next((m for m in range(controls, 50 * n) if fisher(copies, n, 0, m) < LEVEL), None)
    needed = f"; with {more - controls} more controls it would be a claim" if more else ""
    return (
        f"{came}: look at {'it' if copies == 1 else 'them'}. {against} cannot rule out chance "
        f"(p = {p_value:.2g}){needed} (--held-out)."
    )
