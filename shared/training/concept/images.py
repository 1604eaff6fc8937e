"""Folders of images as a network is trained on them: captions, and clean latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...arrays import Float, Tensor
from ...files.images import read_image
from ...files.prompts import METADATA, PromptError, caption_of, image_files, read_table
from ...score.detection import Progress

if TYPE_CHECKING:
    from ...models.adapter import PipelineDenoiser

AT_ONCE = 8
"""Images that the autoencoder encodes at once."""
HOLDOUT = 4
"""One of so many images is kept to measure on what was learnt from the others."""


@dataclass(frozen=True, kw_only=True)
class CaptionedLatents:
    """Images as a network is trained on them."""

    latents: Float[Tensor, " image *latent"]
    """Clean ones, in the network's scale."""
    captions: tuple[str, ...]
    """As they stand in the training set."""

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.captions):
            raise ValueError(
                f"There are {len(self.latents)} latents and {len(self.captions)} captions."
            )

    def part(self, *, holdout: bool) -> "CaptionedLatents":
        """Return the images to learn from, or the holdout."""
        rows = [r for r in range(len(self.captions)) if (r % HOLDOUT == HOLDOUT - 1) == holdout]
        captions = tuple(self.captions[row] for row in rows)
        return CaptionedLatents(latents=self.latents[rows], captions=captions)


def captioned_images(folder: Path) -> list[tuple[Path, str]]:
    """Return the images of a training folder with their captions, which may be empty, in order.

    Raises:
        PromptError: There is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise PromptError(f"There is no such folder: {folder}. Give a folder of images.")
    rows = (row for name in METADATA for table in sorted(folder.rglob(name))
            for row in read_table(table))  # fmt: skip
    texts = {row.image.resolve(): row.text for row in rows if row.image}
    found = [
        (image, texts.get(image.resolve(), "") or caption_of(image))
        for image in image_files(folder)
    ]
    if not found:
        raise PromptError(f"{folder} holds no images.")
    return found


def latents_of(
    denoiser: "PipelineDenoiser", paths: Sequence[Path], progress: Progress | None = None
) -> Tensor:
    """Return clean latents [image *latent], in the scale that the network reads.

    Args:
        denoiser: Of the model.
        paths: Of the images.
        progress: Called with how many more are encoded.

    Raises:
        ValueError: A file is not an image.
    """
    parts = []
    for start in range(0, len(paths), AT_ONCE):
        images = [read_image(path) for path in paths[start : start + AT_ONCE]]
        parts.append(denoiser.encode_images(images))
        if progress is not None:
            progress(len(images))
    return torch.cat(parts) if parts else torch.zeros(0, *denoiser.latent_shape)
