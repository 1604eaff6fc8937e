"""By how much a concept's adapter lowers the denoising loss of an image: what shows the concept.

The adapter predicts the noise of images of its concept better than the model does, and that of
other images no better. Where the line lies is measured on images known to lack the concept.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from ...arrays import Float, Tensor
from ...score.denoiser import Conditioning, Denoiser
from ...score.detection import Progress
from ...score.noise_levels import noised
from ...score.robust import median_and_deviation
from .concept import named_words

LEVELS, OF = (5, 17, 29, 41), 50
"""Noise levels that are looked at, of how many: timesteps 900, 660, 420 and 180 of 1,000."""
DRAWS = 1
"""Noises of each level."""
BATCH = 8
"""Images in one pass."""
DEVIATIONS, NORMAL = 8.0, 1.4826
"""Standard deviations above the controls' median at which the line lies; what the median absolute
deviation is multiplied by to be one, for normal values."""
FEWEST = 8
"""Controls without which there is no line."""


class NotEnoughImages(ValueError):
    """There are too few images, or too many of them are alike."""


@torch.no_grad()
def gains(
    denoiser: Denoiser,
    on: Callable[[], AbstractContextManager[None]],
    latents: Float[Tensor, " image *latent"],
    captions: Sequence[str],
    *,
    progress: Progress | None = None,
) -> Float[Tensor, " image"]:
    """Return the loss without the adapter minus the loss with it, of each image, in float64.

    The loss is the mean squared error per element of the predicted noise (velocity of a flow), mean
    over `LEVELS` and `DRAWS`. Every image meets the same noises, with and without the adapter.

    Args:
        denoiser: The model.
        on: Enters the adapter: `ConceptSwitch.on`.
        latents: Clean ones.
        captions: One per image; they should not name the concept, see `without_names`.
        progress: Called with how many more images are measured.
    """
    sigmas, found = denoiser.sigmas(OF), []
    for start in range(0, len(latents), BATCH):
        rows = latents[start : start + BATCH]
        cond, total = denoiser.encode(list(captions[start : start + BATCH])), torch.zeros(len(rows))
        for number, level in enumerate(LEVELS):
            for draw in range(DRAWS):
                generator = torch.Generator().manual_seed(DRAWS * number + draw)
                noise = torch.randn(1, *rows.shape[1:], generator=generator).to(rows)
                sigma = sigmas[level].to(rows)
                noisy = noised(denoiser.parametrization, rows, noise.expand_as(rows), sigma)
                without = errors(denoiser, rows, noisy, sigma, cond)
                with on():
                    total += (without - errors(denoiser, rows, noisy, sigma, cond)).cpu()
        found.append(total.double() / (len(LEVELS) * DRAWS))
        if progress is not None:
            progress(len(rows))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def errors(
    denoiser: Denoiser, clean: Tensor, noisy: Tensor, sigma: Tensor, cond: Conditioning
) -> Tensor:
    """Return the mean squared error of the predicted noise per element, one an image [image]."""
    x0 = denoiser.denoise(noisy, sigma, cond)
    return ((x0 - clean) / sigma).float().square().flatten(1).mean(1)


def without_names(caption: str, names: Sequence[str]) -> str:
    """Return a caption without the concept's names, as far as they stand as words of their own."""
    while (place := named_words(names, caption)) is not None:
        words = caption.split()
        caption = " ".join([*words[: place.start], *words[place.stop :]])
    return caption.strip(" ,;")


def line_above(controls: Float[Tensor, " image"]) -> float:
    """Return the gain above which an image shows the concept, from images known to lack it.

    Their median plus `DEVIATIONS` standard deviations, estimated by the median absolute deviation:
    one control that happens to resemble the concept must not hide all images that show it. The
    share of controls above the line is for the reader.

    Raises:
        NotEnoughImages: There are fewer than `FEWEST`.
    """
    if len(controls) < FEWEST:
        raise NotEnoughImages(
            f"There are {len(controls)} control images, at least {FEWEST} are needed to say which "
            "gain is usual without the concept. Name a folder of images that lack it."
        )
    median, deviation = median_and_deviation(controls)
    return float(median + DEVIATIONS * NORMAL * deviation)
