"""The training images that mitigated images are compared with, and that one method keeps away from.

They stand beside the prompts, or in a folder of their own; the demo brings its own.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ... import demo
from ...shared.files.images import read_image
from ...shared.files.prompts import METADATA, PromptSet, caption_of, image_files, read_prompts
from ...shared.mitigation import NearestNeighbour
from ..common.measure import Bars
from .comparison import Known, known_images
from .inputs import Inputs
from .mitigation_result import MitigationConfig

if TYPE_CHECKING:
    from ...shared.models.adapter import PipelineDenoiser

BATCH = 16
"""Images that are encoded at once."""


def has_training_images(config: MitigationConfig, inputs: Inputs) -> bool:
    """Return whether training images are named, without reading one."""
    return (
        config.training is not None
        or config.audit.model in demo.BUNDLED
        or any(inputs.prompts.images)
    )


def read_training(folder: Path) -> PromptSet:
    """Return the images of a folder by their captions, "" where one has none.

    Raises:
        ValueError: There is no such folder, or no image in it.
        PromptError: Captions cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}: give one with training images.")
    if any(True for name in METADATA for _ in folder.rglob(name)):
        pairs = [(row.text, row.image) for row in read_prompts(folder) if row.image]
    else:
        pairs = [(caption_of(image), image) for image in image_files(folder)]
    if not pairs:
        raise ValueError(f"{folder} holds no images: give a folder with training images.")
    by_caption: dict[str, list[Path]] = {}
    for caption, image in pairs:
        by_caption.setdefault(caption, []).append(image)
    return PromptSet(
        prompts=tuple(by_caption), sources=((),) * len(by_caption),
        images=tuple(map(tuple, by_caption.values())), read=len(pairs), empty=0,
    )  # fmt: skip


def known_training(config: MitigationConfig, prompts: PromptSet, bars: Bars) -> Known | None:
    """Return the training images of the folder, else those that an audit would know."""
    if config.training is None:
        return known_images(config.audit.model, prompts, bars)
    return known_images("", read_training(config.training), bars)


def keep_away(known: Known, denoiser: "PipelineDenoiser") -> NearestNeighbour:
    """Return the method that keeps away from these images, and from their captions.

    Raises:
        ValueError: None of them is known in full size.
    """
    # The demo has many images of one caption, and in full size those that were repeated.
    pairs = dict.fromkeys(zip(known.captions, known.paths, strict=True))
    captions, latents, images = [], [], []
    for caption, path in pairs:
        if (image := read_image(path) if path else demo.training_image(caption)) is None:
            continue
        captions.append(caption)
        images.append(image)
        if len(images) == BATCH:
            latents.append(denoiser.encode_images(images))
            images = []
    if images:
        latents.append(denoiser.encode_images(images))
    if not latents:
        raise ValueError("None of the training images is known in full size.")
    return NearestNeighbour(latents=torch.cat(latents), captions=tuple(captions))
