"""What two images are compared by; pixels, which need nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arrays import Float
from ..score.detection import Progress
from .neighbours import Bounds

SIDE = 32


@dataclass(frozen=True, kw_only=True)
class Features:
    """What two images are compared by."""

    name: str
    """As a report says it."""
    rows: Callable[..., Tensor]
    """From PIL images, and `progress=` as in detection, to [image number]."""
    similarity: Callable[[float], float]
    """From the Euclidean distance of two rows; 1 for equal images."""
    bounds: Bounds
    """How near is a copy."""


def thumbnails(
    images: Sequence, *, progress: Progress | None = None
) -> Float[Tensor, " image pixels"]:
    """Return PIL images as rows of `SIDE` x `SIDE` RGB values in 0..1."""
    import numpy as np
    from PIL.Image import Resampling

    rows = []
    for image in images:
        rows.append(np.asarray(image.convert("RGB").resize((SIDE, SIDE), Resampling.BOX)))
        if progress is not None:
            progress(1)
    return torch.from_numpy(np.stack(rows)).flatten(1).float() / 255


PIXELS = Features(
    name=f"pixels: 1 minus the root mean square difference of {SIDE} x {SIDE} thumbnails",
    rows=thumbnails,
    similarity=lambda distance: 1 - distance / (3 * SIDE**2) ** 0.5,
    bounds=Bounds(own_factor=0.5, ratio=0.55),
)
