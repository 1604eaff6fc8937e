"""The result of a watched run in words, and as data for the metadata of its images."""

from collections.abc import Sequence

from ..score.calibration import Calibration
from ..wording import counted
from .guard_record import GuardedImage
from .watched_runs import RunVerdict

NO_CALIBRATION = "A verdict needs a calibration of this model."


def headline(verdict: RunVerdict) -> str:
    """Return the result of a run in a few words."""
    images = len(verdict.images)
    if verdict.threshold is None:
        return "Scores only: no calibration"
    if images == 1:
        return "Looks memorized" if verdict.hits else "Does not look memorized"
    if not verdict.hits:
        return f"None of {images} images looks memorized"
    return f"{verdict.hits} of {images} images {'looks' if verdict.hits == 1 else 'look'} memorized"


def image_line(verdict: RunVerdict, index: int) -> str:
    """Return the result of one image of the batch in one line."""
    image = verdict.images[index]
    parts = [f"image {index + 1}", f"score {image.score:.3g}"]
    if image.p_value is not None:
        parts += [f"p = {image.p_value:.2g}", "looks memorized" if image.memorized else "ordinary"]
    return "  ·  ".join(parts)


def report(verdict: RunVerdict, calibration: Calibration | None, extra_passes: int) -> str:
    """Return all there is to say, one fact a line."""
    steps = "the first step" if verdict.steps == 1 else f"the first {verdict.steps} steps"
    lines = [headline(verdict), *(image_line(verdict, i) for i in range(len(verdict.images)))]
    lines.append(f"Score: L2 norm of what the text adds to the prediction, mean over {steps}.")
    if calibration is None:
        lines.append(NO_CALIBRATION)
    else:
        lines.append(
            f"Threshold {verdict.threshold:.4g}: at most {calibration.false_positive_rate:.2g} of "
            f"ordinary prompts score higher, by {len(calibration.control_scores)} controls "
            f"({calibration.controls}). p: share of controls that score at least as high."
        )
    if verdict.caveats:
        lines += ["The calibration does not fit this run:", *verdict.caveats]
    if extra_passes:
        passes = counted(extra_passes, "additional pass", "additional passes")
        lines.append(f"Measured anyway: {passes} of the network.")
    return "\n".join(lines)


def guard_lines(images: Sequence[GuardedImage]) -> list[str]:
    """Return what a guard decided about each image of a run, one line each."""
    lines = []
    for number, image in enumerate(images, 1):
        acted = f"acted by {image.method}" if image.fired else "did not act"
        parts = [f"image {number}", f"guard {acted}"]
        if image.score_before is not None:
            parts.append(f"prompt scores {image.score_before:.3g}, threshold {image.threshold:.3g}")
        if image.noise_before is not None:
            parts.append(f"initial noise {image.noise_before:.3g} to {image.noise_after:.3g}")
        lines.append("  ·  ".join(parts))
    return lines


def metadata(verdict: RunVerdict) -> dict:
    """Return the result as plain JSON values, for the metadata of the saved images."""
    images = verdict.images
    return {
        "score": [image.score for image in images],
        "score_per_element": [image.per_element for image in images],
        "steps": verdict.steps,
        "threshold": verdict.threshold,
        "p_value": [image.p_value for image in images],
        "memorized": [image.memorized for image in images],
        "caveats": list(verdict.caveats),
    }
