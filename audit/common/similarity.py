"""How near a generated image is to a training image, and how near is "clearly nearer"."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...shared.arrays import Float
from ...shared.score.detection import Progress

SIDE = 32
NEIGHBOURS = 50
ALPHA = 0.5


@dataclass(frozen=True, kw_only=True)
class Features:
    """What two images are compared by."""

    name: str
    """As a report says it."""
    rows: Callable[..., Tensor]
    """From PIL images, and `progress=` as in detection, to [image number]."""
    similarity: Callable[[float], float]
    """From the Euclidean distance of two rows; 1 for equal images."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The training image nearest to one generated image."""

    index: int
    """Position in the reference set."""
    similarity: float
    """In the units of the features, 1 for equal images."""
    ratio: float
    """Distance relative to the other near training images; small means a copy of this one alone."""


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
)


def sscd_features() -> Features:
    """Return SSCD, which knows an image again when it was cropped, recoloured or mirrored.

    Raises:
        ImportError: The extra `sscd` is not installed.
    """
    from .sscd import Sscd

    return Features(
        name="SSCD (distilled): cosine of the embeddings",
        rows=Sscd().embed,
        similarity=lambda distance: 1 - distance**2 / 2,  # of unit vectors
    )


class Reference:
    """Training images to compare with.

    The ratio is the extraction test of Carlini et al. 2023 (arXiv:2301.13188): the distance to
    the nearest image over `ALPHA` times the mean distance to the `NEIGHBOURS` nearest. It asks
    whether *one* training image stands out, so a common plain background does not count as a copy.
    """

    def __init__(
        self, images: Sequence, features: Features = PIXELS, *, progress: Progress | None = None
    ):
        if len(images) < 2:
            raise ValueError(f"A reference needs at least 2 training images, got {len(images)}.")
        self.features = features
        self.rows = features.rows(images, progress=progress)

    def nearest(self, images: Sequence) -> list[Nearest]:
        """Return the nearest training image of each PIL image."""
        rows = self.features.rows(images)
        count = min(NEIGHBOURS, len(self.rows))
        distances, indices = torch.cdist(rows, self.rows).topk(count, largest=False)
        ratios = distances[:, 0] / (ALPHA * distances.mean(1)).clamp_min(1e-12)
        return [
            Nearest(index=index, similarity=self.features.similarity(distance), ratio=ratio)
            for index, distance, ratio in zip(
                indices[:, 0].tolist(), distances[:, 0].tolist(), ratios.tolist(), strict=True
            )
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
