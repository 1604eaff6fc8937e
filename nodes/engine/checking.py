"""Whether a prompt is memorized, before anything is sampled, whatever sampler follows.

A verdict compares like with like: texts alone, at the noises and levels of the controls. So each
entry of a CONDITIONING is measured by itself, without what stands around its text, and the steps,
scheduler and strength of the sampling that follows do not matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from comfy.model_patcher import ModelPatcher

from ...shared.mitigation.gate import Gate
from ...shared.score.calibration import Calibration
from ...shared.wording import counted, name_some
from .automatic import automatic
from .measuring import ROWS, encoded, latent_shape, scores_in_order
from .model_identity import weights_sha256

NO_PROOF = (
    "It is no proof: compare the images with the training set. The node Unmemorize changes such "
    "prompts."
)
OTHER_KINDS = (
    "This holds for prompts like the controls. Connect Calibrate with controls of your own for "
    "prompts of tags or in other languages, and for models of one narrow style."
)
MISFIT = (
    "The connected calibration does not fit: {}. Disconnect it to have this model calibrated by "
    "itself, or run Calibrate with these settings."
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """The verdict on a prompt."""

    scores: tuple[float, ...]
    """One per entry of the CONDITIONING, as the calibration scores."""
    calibration: Calibration
    """What they are compared with."""
    texts: tuple[list, ...]
    """One CONDITIONING per entry: the text alone, as it was measured."""
    against: list
    """CONDITIONING that it was compared with."""
    left_out: tuple[str, ...]
    """What the entries hold besides their text, by ComfyUI's names; it was not measured."""
    residual: bool
    """The scores are 1 for an ordinary prompt; else they are magnitudes, L2 norms."""
    misfit: str = ""
    """Why there is no verdict, "" where there is one."""

    @property
    def flags(self) -> tuple[bool, ...]:
        """Return which entries are above the threshold; none without a verdict."""
        if self.misfit:
            return (False,) * len(self.scores)
        return tuple(self.calibration.flags(self.scores).tolist())

    @property
    def headline(self) -> str:
        """Return the verdict in a few words."""
        if self.misfit:
            return "No verdict"
        return "Looks memorized" if any(self.flags) else "Does not look memorized"

    def __str__(self) -> str:
        judge, p_values = self.calibration, self.calibration.p_values(self.scores).tolist()
        lines, unit = [self.headline], "1: ordinary" if self.residual else "L2"
        for number, (score, p) in enumerate(zip(self.scores, p_values, strict=True), 1):
            part = f"part {number} of the prompt: " if len(self.scores) > 1 else ""
            compared = "" if self.misfit else f", threshold {judge.threshold:.4g}, p = {p:.2g}"
            lines.append(f"{part}score {score:.4g} ({unit}){compared}")
        if self.misfit:
            return "\n".join([*lines, self.misfit])
        number = counted(len(judge.control_scores), "control prompt", "control prompts")
        lines.append(
            f"At most {judge.false_positive_rate:.2g} of ordinary prompts score higher than the "
            f"threshold, by {number} ({judge.controls}) on this very model."
        )
        if self.left_out:
            lines.append(f"Measured is the text alone, without: {name_some(self.left_out)}.")
        return "\n".join([*lines, *([NO_PROOF] if any(self.flags) else []), OTHER_KINDS])


def check_prompt(
    model: ModelPatcher,
    clip: Any,
    positive: list,
    negative: list | None,
    latent: Mapping[str, Any],
    calibration: Calibration | None = None,
) -> Check:
    """Return the verdict on a prompt; without a calibration by the automatic one.

    Args:
        model: MODEL.
        clip: CLIP that encoded the prompt.
        positive: CONDITIONING; each entry is measured by itself.
        negative: CONDITIONING that scores are measured against; None takes the empty text.
        latent: LATENT of the size to measure at.
        calibration: Of this model. It is not used where it does not fit.
    """
    empty = encoded(clip, "")
    # What a text alone has; areas, masks, times, ControlNets, guidance and the like are more.
    plain = set().union(*(extra for _, extra in empty))
    texts = [[[text, {k: v for k, v in extra.items() if k in plain}]] for text, extra in positive]
    against = [
        [text, {k: v for k, v in extra.items() if k in plain}] for text, extra in negative or empty
    ]
    judge = (calibration or automatic(model, clip, against, latent)).judge
    config = replace(Gate(mode="always", calibration=judge).config, batch_size=ROWS)
    # Bases are of one size; at another there are magnitudes.
    basis = judge.basis if judge.latent_shape == latent_shape(model, latent) else None
    rows, now = scores_in_order(model, texts, against, latent, config, basis)
    differing = judge.differences(weights_sha256(model), now)
    return Check(
        scores=tuple(score for score, _ in rows),
        calibration=judge,
        texts=tuple(texts),
        against=against,
        left_out=tuple({key for _, extra in positive for key in extra} - plain),
        residual=basis is not None,
        misfit=differing and MISFIT.format(differing),
    )
