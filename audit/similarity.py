"""How near a generated image is to a training image, and how near is "clearly nearer"."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shared.arrays import Float

SIDE = 32
NEIGHBOURS = 50
ALPHA = 0.5


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The training image nearest to one generated image."""

    index: int
    """Position in the reference set."""
    distance: float
    """Root mean square difference of the two thumbnails, 0 (equal) to 1."""
    ratio: float
    """Distance relative to the other near training images; small means a copy of this one alone."""


def thumbnails(images: Sequence) -> Float[Tensor, " image pixels"]:
    """Return PIL images as rows of `SIDE` x `SIDE` RGB values in 0..1."""
    import numpy as np
    from PIL.Image import Resampling

    rows = [np.asarray(i.convert("RGB").resize((SIDE, SIDE), Resampling.BOX)) for i in images]
    return torch.from_numpy(np.stack(rows)).flatten(1).float() / 255


class Reference:
    """Training images to compare with, by pixels alone: no weights, no network.

    The ratio is the extraction test of Carlini et al. 2023 (arXiv:2301.13188): the distance to
    the nearest image over `ALPHA` times the mean distance to the `NEIGHBOURS` nearest. It asks
    whether *one* training image stands out, so a common plain background does not count as a copy.
    """

    def __init__(self, images: Sequence):
        if len(images) < 2:
            raise ValueError(f"A reference needs at least 2 training images, got {len(images)}.")
        self.rows = thumbnails(images)

    def nearest(self, images: Sequence) -> list[Nearest]:
        """Return the nearest training image of each PIL image."""
        rows = thumbnails(images)
        count = min(NEIGHBOURS, len(self.rows))
        distances, indices = torch.cdist(rows, self.rows).topk(count, largest=False)
        ratios = distances[:, 0] / (ALPHA * distances.mean(1)).clamp_min(1e-12)
        rms = distances[:, 0] / rows.shape[1] ** 0.5
        return [
            Nearest(index=i, distance=d, ratio=r)
            for i, d, r in zip(indices[:, 0].tolist(), rms.tolist(), ratios.tolist(), strict=True)
        ]


def calibrate_ratio(reference: Reference, controls: Sequence, rate: float = 0.01) -> float:
    """Return the ratio below which only a share `rate` of images that are *no* copies fall.

    Args:
        reference: The training images.
        controls: Images like the training images but not among them.
        rate: Share of the controls allowed below, in (0, 1).

    Raises:
        ValueError: There are too few controls to speak about `rate`.
    """
    rank = int(rate * (len(controls) + 1))
    if rank < 1:
        needed = round(1 / rate) - 1
        raise ValueError(
            f"{len(controls)} controls cannot support a rate of {rate}: {needed} are needed."
        )
    return sorted(nearest.ratio for nearest in reference.nearest(controls))[rank - 1]
