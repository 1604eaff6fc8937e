"""Folders of images as a network is trained on them: captions, and clean latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...files.images import read_image
from ...files.prompts import METADATA, PromptError, caption_of, image_files, read_prompts
from ...score.detection import Progress

if TYPE_CHECKING:
    from ...models.adapter import PipelineDenoiser

AT_ONCE = 8
"""Images that the autoencoder encodes at once."""


def captioned_images(folder: Path) -> list[tuple[Path, str]]:
    """Return the images of a training folder with their captions, which may be empty, in order.

    Raises:
        PromptError: There is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise PromptError(f"There is no such folder: {folder}. Give a folder of images.")
    if any(next(folder.rglob(name), None) for name in METADATA):
        found = [(each.image, each.text) for each in read_prompts(folder) if each.image]
    else:
        found = [(image, caption_of(image)) for image in image_files(folder)]
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
