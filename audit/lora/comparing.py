"""How near every generation is to every training image.

A model cannot draw what its autoencoder cannot say. Where that is coarse, a perfect copy is far
from the image itself and close to the image's round trip through the autoencoder. So each training
image stands for itself and for its round trip, and the nearer of the two counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...shared.arrays import Float, Tensor
from ...shared.files.images import ImageFiles
from ...shared.files.storage import replace_atomically
from ..common.job import Job
from ..common.measure import Bars
from ..common.similarity import PIXELS
from ..common.sscd import similarity
from ..common.subject import Subject
from .attack import as_images
from .feature_cache import FeatureCache
from .index import Index

if TYPE_CHECKING:
    from ...shared.models.adapter import PipelineDenoiser

AT_ONCE = 4
"""Images in one pass through the autoencoder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """Training images, held-out ones included, as generations are compared with them."""

    rows: Float[Tensor, " image dimension"]
    """Embeddings of the images, unit vectors."""
    drawn: Float[Tensor, " image dimension"]
    """Embeddings of their round trips."""
    layouts: Float[Tensor, " image pixels"]
    """Thumbnails of their round trips."""

    @property
    def ceilings(self) -> Float[Tensor, " image"]:
        """Return the cosine of each image and its round trip."""
        return (self.rows * self.drawn).sum(1).clamp(-1, 1)

    def similarities(self, generated: Float[Tensor, " row dimension"]) -> Tensor:
        """Return [row image] cosines to the image or its round trip, whichever is nearer."""
        return torch.maximum(similarity(generated, self.rows), similarity(generated, self.drawn))

    def nearest(
        self, generated: Float[Tensor, " row dimension"], among: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """Return the nearest of the images `among`, and its cosine, for each row."""
        chosen = torch.tensor(list(among))
        index = Index(torch.cat([self.rows[chosen], self.drawn[chosen]]))
        cosines, places = index.search(generated)
        return chosen[places[:, 0] % len(chosen)].tolist(), cosines[:, 0].tolist()

    def peers(self, among: Sequence[int]) -> Float[Tensor, " row"]:
        """Return how near each image of `among`, as the model would draw it, is to any other.

        That is what an image of the same subject reaches without being a copy. Leave
        near-duplicates out: a copy of one is a copy of the other.
        """
        chosen = torch.tensor(list(among))
        count = len(chosen)
        if count < 2:
            return torch.empty(0)
        index = Index(torch.cat([self.rows[chosen], self.drawn[chosen]]))
        # An image meets itself and its own round trip; the third is another's, if not before.
        cosines, places = index.search(self.drawn[chosen], k=3)
        other = places % count != torch.arange(count)[:, None]
        return cosines.where(other, torch.tensor(-torch.inf)).amax(1)


def refer(
    paths: Sequence[Path],
    subject: Subject,
    job: Job,
    bars: Bars,
    *,
    cache: FeatureCache,
    drawn: FeatureCache,
) -> References:
    """Return the references; round trips are drawn once and kept with the job.

    Args:
        paths: Of all images.
        subject: Its autoencoder is used; the LoRA does not touch it.
        job: Keeps the round trips.
        bars: Makes the progress bars.
        cache: Of the user's images.
        drawn: Of images that nobody needs after the job.
    """
    bar = bars("training images", len(paths), 0, "image")
    try:
        rows = cache.rows(paths, progress=bar.update)
    finally:
        bar.close()
    trips = [job.folder / "journal" / "round_trips" / f"{i:06d}.png" for i in range(len(paths))]
    left = [i for i, trip in enumerate(trips) if not trip.is_file()]
    bar = bars("autoencoder", len(trips), len(trips) - len(left), "image")
    try:
        for start in range(0, len(left), AT_ONCE):
            part = left[start : start + AT_ONCE]
            _round_trips(subject.denoiser, [paths[i] for i in part], [trips[i] for i in part])
            bar.update(len(part))
    finally:
        bar.close()
    return References(rows=rows, drawn=drawn.rows(trips), layouts=PIXELS.rows(ImageFiles(trips)))


def _round_trips(
    denoiser: "PipelineDenoiser", sources: Sequence[Path], targets: Sequence[Path]
) -> None:
    """Write what the autoencoder makes of images, each in the size the network draws."""
    latents = denoiser.encode_images(list(ImageFiles(sources)))
    for image, target in zip(as_images(denoiser.decode(latents)), targets, strict=True):
        with replace_atomically(target) as part:
            image.save(part, format="PNG")


def layout_similarities(
    paths: Sequence[Path], references: References
) -> Float[Tensor, "row image"]:
    """Return 1 minus the root mean square difference of thumbnails, 0 to 1, [row image]."""
    rows = PIXELS.rows(ImageFiles(paths))
    return 1 - torch.cdist(rows, references.layouts) / rows.shape[1] ** 0.5


def save_matrix(path: Path, matrix: Float[Tensor, "generation image"]) -> None:
    """Write `matrix` as similarity.npz, float32; the same values give the same bytes."""
    with replace_atomically(path) as part, part.open("wb") as file:
        np.savez_compressed(file, matrix=matrix.numpy())
