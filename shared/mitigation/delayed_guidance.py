"""Delayed guidance: leave the prompt out until the trajectory has left the attraction basin.

Jain et al., CVPR 2025, arXiv:2411.16738.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .method import Method, Mitigation, Start, Step

MODES = ("dynamic", "static")


@dataclass(frozen=True, kw_only=True)
class DelayedGuidance(Method):
    """Apply no guidance before a transition point, the run's own after it.

    "No classifier-free guidance" is read as in the authors' static script and README
    (`guidance_scale 0.0`): the unconditional prediction alone. Their dynamic script follows the
    conditional prediction instead; `scale_before` 1.0 is that.
    """

    name: ClassVar[str] = "delayed_guidance"
    needs_guidance: ClassVar[bool] = True

    mode: str = "dynamic"
    """"dynamic": an image's guidance starts at the first local minimum of its |D| over the steps,
    seen one step later, when |D| rises. "static": at `start_percent`."""
    start_percent: float = 0.5
    """Share of the schedule after which guidance starts, in dynamic mode at the latest, 0..1
    (paper, static: t = 500 of 1000, so 0.5); 0 changes nothing. The fallback is ours: a |D| that
    never has a minimum would leave the prompt out of the whole run."""
    scale_before: float = 0.0
    """Guidance scale before the transition; 0.0 is the unconditional prediction, 1.0 the
    conditional one (authors' scripts: 0.0 static, 1.0 dynamic)."""
    opposite_scale: float | None = None
    """Opposite guidance: scale until `opposite_until`, at most 0 (authors' README: -2); None is
    none. Their static setting is -2, with `opposite_until` and `start_percent` both 0.35."""
    opposite_until: float = 0.35
    """Share of the schedule, 0..1 (authors' README: t = 650 of 1000, so 0.35)."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}.")
        for name in ("start_percent", "opposite_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in 0..1, got {getattr(self, name)}.")
        if not math.isfinite(self.scale_before):
            raise ValueError(f"`scale_before` must be finite, got {self.scale_before}.")
        opposite = self.opposite_scale
        if opposite is not None and not (opposite <= 0 and math.isfinite(opposite)):
            raise ValueError(f"`opposite_scale` must be at most 0, got {opposite}.")

    def scale_at(self, percent: float) -> float:
        """Return the guidance scale of an image whose guidance has not started."""
        if self.opposite_scale is not None and percent < self.opposite_until:
            return self.opposite_scale
        return self.scale_before

    def start(self, start: Start) -> "Delay":
        """Return the delay of one run."""
        return Delay(self)


class Delay(Mitigation):
    """Which images of one run have passed their transition point."""

    def __init__(self, settings: DelayedGuidance):
        super().__init__()
        self.settings = settings
        self.started: Tensor | None = None
        """[image] bool; None before the first step."""
        self._magnitudes: list[Tensor] = []

    def guide(self, step: Step) -> Tensor | None:
        """Return the prediction of images that wait; None when all have started."""
        self.started = started = self._watch(step)
        if started.all():
            return None
        before = step.guided(self.settings.scale_at(step.percent))
        if not started.any():
            return before
        return torch.where(started.view(-1, *[1] * (before.ndim - 1)), step.guided(), before)

    def _watch(self, step: Step) -> Tensor:
        """Return the images that have started, with those whose |D| has just risen after a fall."""
        now, started = step.magnitude, self.started
        if started is None:
            started = torch.zeros(len(now), dtype=torch.bool, device=now.device)
        if step.percent >= self.settings.start_percent:
            return torch.ones_like(started)
        if self.settings.mode == "dynamic":
            self._magnitudes = [*self._magnitudes[-2:], now]
            if len(self._magnitudes) == 3:
                first, last, now = self._magnitudes
                started = started | ((first > last) & (last < now))
        return started
