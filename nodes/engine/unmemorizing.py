"""A memorized prompt's embeddings moved until the prompt adds no more than an ordinary one does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from nodes import common_ksampler

from ...shared.arrays import Float, Tensor
from ...shared.mitigation.gate import Gate
from ...shared.mitigation.ordinary import OrdinaryEmbedding
from ...shared.score.calibration import Calibration
from .checking import Check, check_prompt
from .mitigating import mitigate_prompt

LOOK_STEPS, LOOK_CFG = 20, 7.0
"""Of the images before and after, which are for looking: the sampler's own are unknown here."""


@dataclass(frozen=True, kw_only=True)
class Unmemorized:
    """What was decided about a prompt, and what became of it."""

    positive: list
    """CONDITIONING; the very one that came in where nothing was changed."""
    against: list
    """CONDITIONING that it was compared with."""
    before: Check
    after: Check | None
    """Of the changed prompt; None where nothing was changed."""

    @property
    def headline(self) -> str:
        """Return what was done in a few words."""
        if self.after is None:
            return f"Not changed: {self.before.headline[0].lower()}{self.before.headline[1:]}"
        return "Changed, and still above the threshold" if any(self.after.flags) else "Changed"

    def __str__(self) -> str:
        if self.after is None:
            return f"{self.headline}\n{self.before}"
        scores = ", ".join(
            f"{old:.4g} to {new:.4g}"
            for old, new, flag in zip(
                self.before.scores, self.after.scores, self.before.flags, strict=True
            )
            if flag
        )
        lines = [
            f"{self.headline}: score {scores}, threshold {self.before.calibration.threshold:.4g}"
        ]
        if any(self.after.flags):
            lines.append("Raise the strength, or look whether the image comes back.")
        return "\n".join([*lines, "Before:", str(self.before)])


def unmemorize_prompt(
    model: ModelPatcher,
    clip: Any,
    positive: list,
    negative: list | None,
    latent: Mapping[str, Any],
    strength: float,
    calibration: Calibration | None = None,
) -> Unmemorized:
    """Check a prompt, and change those of its parts that are memorized.

    Args:
        model: MODEL.
        clip: CLIP that encoded the prompt.
        positive: CONDITIONING.
        negative: As for `check_prompt`.
        latent: LATENT of the size to measure at.
        strength: How far to go from the prompt, 0, to the one that was found, 1.
        calibration: As for `check_prompt`.

    Raises:
        ValueError: The network does not read the conditioning as it is.
    """
    before = check_prompt(model, clip, positive, negative, latent, calibration)
    if strength == 0 or not any(before.flags):
        return Unmemorized(positive=positive, against=before.against, before=before, after=None)
    gate = Gate(mode="always", calibration=before.calibration)
    one = {**latent, "samples": latent["samples"][:1]}  # all images get the same embedding
    changed = []
    for (text, extra), part, flag in zip(positive, before.texts, before.flags, strict=True):
        if flag:
            found = mitigate_prompt(
                model, part, before.against, one, 0, method=OrdinaryEmbedding(), gate=gate,
                force=False,
            )  # fmt: skip
            text = torch.lerp(text, found.positive[0][0].to(text), strength)
        changed.append([text, extra])
    after = check_prompt(model, clip, changed, negative, latent, before.calibration)
    return Unmemorized(positive=changed, against=before.against, before=before, after=after)


def look(
    model: ModelPatcher, vae: Any, prompts: Sequence[list], negative: list,
    latent: Mapping[str, Any],
) -> Float[Tensor, " prompt height width 3"]:  # fmt: skip
    """Return one image per prompt, all from the same starting noise, 0..1."""
    empty = {"samples": torch.zeros_like(latent["samples"][:1])}
    drawn = []
    for prompt in prompts:
        (sampled,) = common_ksampler(
            model, 0, LOOK_STEPS, LOOK_CFG, "euler", "normal", prompt, negative, empty
        )
        drawn.append(vae.decode(sampled["samples"])[..., :3])
    return torch.cat(drawn).reshape(len(prompts), *drawn[0].shape[-3:])
