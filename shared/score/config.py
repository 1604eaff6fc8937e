"""What a detection measures; apart from the rest, so that the command line need not load torch."""

import math
from dataclasses import dataclass

CLIP_PARTS = ("content", "motion")
"""Of a clip's magnitude: what all frames share, and the rest; each has a threshold of its own."""


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """What is measured. All but `batch_size` decide the score."""

    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Starting noises; the score is the mean over them."""
    steps: int = 1
    """Denoising steps to average over, counted from the noisiest."""
    schedule_steps: int = 50
    """Length of the sampling run those steps are taken from."""
    cond_scale: float = 7.5
    """Guidance along the trajectory, 1.0 = none; without effect when `steps` is 1."""
    batch_size: int | None = None
    """Rows of one forward pass; None chooses by device and latent size."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"`seeds` must be one or more different integers from 0, got {list(self.seeds)}."
            )
        if not 1 <= self.steps <= self.schedule_steps:
            raise ValueError(
                f"`steps` must be between 1 and `schedule_steps` ({self.schedule_steps}), "
                f"got {self.steps}."
            )
        if not math.isfinite(self.cond_scale):
            raise ValueError(f"`cond_scale` must be finite, got {self.cond_scale}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
