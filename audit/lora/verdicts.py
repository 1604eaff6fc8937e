"""What may be said of each training image and of the whole LoRA: thresholds and verdicts.

From which similarity on an image counts as given back depends on what controls reach. There is no
fixed number: on photographs unrelated images stay below .3, on flat art they pass .5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...shared.arrays import Float, Tensor
from ...shared.score.rates import NotEnoughControls, controls_needed
from ...shared.wording import counted
from ..common.sscd import calibrate
from ..common.wording import between, percent
from .result import Headline, ImageVerdict, PositiveControl, Rate, Thresholds, Verdict

LEVEL = 0.05
"""p-value below which a difference from the controls is called one."""
ABOVE = 0.05
"""Share of controls that may lie above `near`."""
NEEDED = controls_needed(ABOVE)


def near_threshold(controls: Float[Tensor, " control"]) -> float | None:
    """Return the similarity that a further control exceeds with probability `ABOVE` at most.

    None when there are too few controls to say so.
    """
    try:
        return calibrate(controls, ABOVE)
    except NotEnoughControls:
        return None


def thresholds(
    off: Float[Tensor, " image"],
    held_out: Float[Tensor, " control"],
    peers: Float[Tensor, " row"],
) -> Thresholds:
    """Return the thresholds that three kinds of controls carry together.

    `verbatim` lies half-way from `near` to 1, the similarity of an image and itself: a copy is
    nearer to its image than to what controls reach.

    Args:
        off: Per training image, its most similar generation without the LoRA.
        held_out: Per image that was not trained on, its most similar generation with the LoRA.
        peers: Per training image, its most similar other image of the same subject.
    """
    controls = torch.cat([off, held_out, peers])
    near, count = near_threshold(controls), len(controls)
    trained = ("training image", "training images")
    kinds = [f"{counted(len(off), *trained)} against generations without the LoRA"]
    if len(held_out):
        held = counted(len(held_out), "held-out image", "held-out images")
        kinds.append(f"{held} against generations with it")
    named = ", ".join([*kinds, f"{counted(len(peers), *trained)} against each other"])
    if near is None:
        method = (
            f"{counted(count, 'control', 'controls')} ({named}) cannot carry a threshold: "
            f"{NEEDED} are needed. Give {NEEDED - count} or more images of the same subject that "
            "were not trained on (--held-out)."
        )
        return Thresholds(verbatim=None, near=None, method=method, controls=count)
    method = (
        f"Near: above what {percent(1 - ABOVE)} of {count} controls reach ({named}). "
        "Verbatim: above the middle between that and the similarity of an image and itself, 1."
    )
    return Thresholds(verbatim=(1 + near) / 2, near=near, method=method, controls=count)


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What the verdicts rest on; rows are generations, columns all images, held-out ones last."""

    matrix: Float[Tensor, "generation image"]
    """Cosines."""
    layouts: Float[Tensor, "generation image"]
    """Similarities of the arrangement: 1 minus the root mean square difference of thumbnails."""
    on: Sequence[int]
    """Generations with the LoRA, without the attack's."""
    off: Sequence[int]
    """The same prompts and seeds without the LoRA."""
    trained: int
    """Columns that were trained on, from the first."""

    @property
    def off_best(self) -> Float[Tensor, " image"]:
        """Return the highest cosine without the LoRA of each image that was trained on."""
        return self.matrix[list(self.off), : self.trained].amax(0)

    @property
    def held_out(self) -> Float[Tensor, " control"]:
        """Return the highest cosine with the LoRA of each image it was not trained on."""
        return self.matrix[list(self.on), self.trained :].amax(0)

    @property
    def layout_controls(self) -> Float[Tensor, " control"]:
        """Return the arrangements that controls reach: LoRA off, and held-out images."""
        off = self.layouts[list(self.off), : self.trained].amax(0)
        return torch.cat([off, self.layouts[list(self.on), self.trained :].amax(0)])


def weigh(
    evidence: Evidence,
    ceilings: Float[Tensor, " image"],
    peers: Float[Tensor, " row"],
    instrument: PositiveControl,
) -> tuple[Thresholds, tuple[ImageVerdict, ...], Headline]:
    """Return the thresholds that the controls carry, and what follows for images and LoRA."""
    limits = thresholds(evidence.off_best, evidence.held_out, peers)
    layout_limit = near_threshold(evidence.layout_controls)
    verdicts = judge_images(evidence, ceilings, limits, layout_limit)
    return limits, verdicts, summarize(verdicts, evidence, limits, instrument)


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
    attracted = torch.bincount(on.argmax(1), minlength=trained).tolist()
    off, (best, rows) = evidence.off_best.tolist(), on.max(0)
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
    n, limit = len(verdicts), limits.verbatim
    cosines = torch.cat([evidence.off_best, evidence.held_out])
    hits, m = 0 if limit is None else int((cosines > limit).sum()), len(cosines)
    reproduced, controls = Rate.of(copies, n), Rate.of(hits, m)

    def refused(text: str) -> Headline:
        return Headline(text=text, given=False, reproduced=reproduced, controls=controls,
                        p_value=None)  # fmt: skip

    if not instrument.works:
        return refused(f"The instrument failed, so nothing can be said. {instrument.detail}")
    if limit is None:
        return refused(f"Not enough controls for a claim. {limits.method}")
    p_value = fisher(copies, n, hits, m)
    images, against = counted(n, "training image", "training images"), _controls(m)
    if copies == 0:
        if (least := _least_images(m)) > n:
            return refused(
                f"No training image came back, but {n} could not have shown it: at least {least} "
                f"are needed beside {against}."
            )
        text = (
            f"None of {images} came back; for other prompts and seeds that leaves room for up to "
            f"{percent(reproduced.high)} of them (95 % interval)."
        )
    elif p_value >= LEVEL:
        return refused(_undecided(copies, n, hits, m, p_value))
    else:
        text = (
            f"{copies} of {images} {'comes' if copies == 1 else 'come'} back "
            f"({between(reproduced.low, reproduced.high)}, 95 % interval), against {hits} of "
            f"{against}."
        )
    return Headline(
        text=text, given=True, reproduced=reproduced, controls=controls, p_value=p_value
    )


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
    against = _controls(controls)
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


def _controls(count: int) -> str:
    return counted(count, "control", "controls")
