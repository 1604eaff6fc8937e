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
from .concept import named_words

LEVELS, OF = (5, 17, 29, 41), 50
"""Noise levels that are looked at, of how many: timesteps 900, 660, 420 and 180 of 1,000."""
DRAWS = 1
"""Noises of each level."""
BATCH = 8
"""Images in one pass."""
DEVIATIONS = 3.0
"""Standard deviations of the controls above their mean, at which the line lies at least."""
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

    The largest of the controls, or `DEVIATIONS` standard deviations above their mean if that is
    more. A further image without the concept lies above the largest of n with probability
    1 / (n + 1) at most, whatever the distribution.

    Raises:
        NotEnoughImages: There are fewer than `FEWEST`.
    """
    if len(controls) < FEWEST:
        raise NotEnoughImages(
            f"There are {len(controls)} control images, at least {FEWEST} are needed to say which "
            "gain is usual without the concept. Name a folder of images that lack it."
        )
    return max(float(controls.max()), float(controls.mean() + DEVIATIONS * controls.std()))
