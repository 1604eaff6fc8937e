"""Training images of the demo model with a mark drawn on them."""

from collections.abc import Callable

import torch
from PIL import ImageDraw
from unmemorize import demo
from unmemorize.shared.models.adapter import PipelineDenoiser

COLOUR = "#ff00d4"


def latents_of(
    denoiser: PipelineDenoiser,
    first: int,
    count: int,
    mark: Callable[[ImageDraw.ImageDraw], object] | None,
) -> torch.Tensor:
    """Return images from the first on, encoded; `mark` draws on each, None leaves them."""
    images = []
    for image in demo.training_images()[first : first + count]:
        image = image.convert("RGB").resize(denoiser.resolution)
        if mark:
            mark(ImageDraw.Draw(image))
        images.append(image)
    return denoiser.encode_images(images)
