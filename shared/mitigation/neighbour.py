"""Nearest-neighbour guidance, for those who have the training images: keep away from them.

AMG (anti-memorization guidance), Chen, Liu and Xu, CVPR 2024, arXiv:2404.00922.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from ..arrays import Float, Tensor, widened
from ..score.denoiser import Conditioning, Denoiser, concatenate
from .method import Method, Mitigation, Start, Step

Similarity = Callable[[Tensor, Tensor], Tensor]
"""Of x0 [row *latent] with latents [image *latent]: [row image], differentiable in the first."""


def cosine(
    x0: Float[Tensor, " row channel *place"], latents: Float[Tensor, " image channel *place"]
) -> Float[Tensor, " row image"]:
    """Return the cosine of latents, each without the mean of its channels, in -1..1."""
    return _centred(x0) @ _centred(latents).T


@dataclass(frozen=True, kw_only=True, eq=False)
class NearestNeighbour(Method):
    """Guide less, and step away, while the predicted image is too near a training image.

    Modified: similarity is measured between latents, not by SSCD or pixels of decoded images. The
    step away follows the gradient with regard to the predicted clean latents, not through the
    network to x_t, and has a length of its own, because a gradient's length says little about how
    far one must go. Caption deduplication (G_dup) is left out: latents come without captions.
    """

    name: ClassVar[str] = "neighbour"
    needs_guidance: ClassVar[bool] = True

    latents: Tensor
    """[image *latent] the training images as the autoencoder encodes them, in the scale that the
    network works in; all of them are kept on its device."""
    captions: tuple[str, ...] = ()
    """One per image, "" where it is not known; none for none. Guidance also goes away from the
    caption of the image that is too near (paper: caption deduplication, G_dup), which takes one
    more pass. Needs a host that encodes text."""
    similarity: Similarity = cosine
    """What near means."""
    bound_start: float = 0.5
    """Similarity above which the method acts at the start of the schedule. The bound goes to
    `bound_end` as a parabola (paper: lambda_t, parabolic; its numbers are for other measures)."""
    bound_end: float = 0.7
    """The same at the end; higher, as predictions grow sharper and all similarities with them."""
    despecification: float = 6.5
    """c_1, at least 0: guidance is reduced by c_1 times the similarity, at most to 1.0 (paper,
    Eq. 13; it gives no value; 6.5 undoes all of 7.5 at similarity 1)."""
    deduplication: float = 6.5
    """c_2, at least 0: how far guidance goes away from the neighbour's caption, c_2 times the
    similarity, at most what the reduction by c_1 has left above 1.0 (paper, Eqs. 15 and 16; it
    gives no value)."""
    repulsion: float = 0.5
    """c_3, at least 0: length of the step away, as a share of the norm of the predicted latents
    (paper, Eq. 17, in other units; it gives no value)."""

    def __post_init__(self) -> None:
        if self.latents.ndim < 3 or len(self.latents) == 0:
            raise ValueError(
                "`latents` must hold at least one image, [image channel height width], got shape "
                f"{tuple(self.latents.shape)}."
            )
        if not self.latents.isfinite().all():
            raise ValueError("`latents` must be finite, got NaN or infinity.")
        for name in ("bound_start", "bound_end"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` must be finite, got {getattr(self, name)}.")
        if self.captions and len(self.captions) != len(self.latents):
            raise ValueError(
                f"`captions` must hold one per image, {len(self.latents)}, or none, got "
                f"{len(self.captions)}."
            )
        for name in ("despecification", "deduplication", "repulsion"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")

    def bound(self, percent: float) -> float:
        """Return the similarity above which the method acts."""
        return self.bound_start + (self.bound_end - self.bound_start) * percent**2

    def start(self, start: Start) -> "KeepAway":
        """Return the watch over one run.

        Raises:
            ValueError: The training latents have another shape than the run's.
        """
        if self.latents.shape[1:] != start.x.shape[1:]:
            raise ValueError(
                f"The training latents have shape {tuple(self.latents.shape[1:])}, the run's "
                f"{tuple(start.x.shape[1:])}: encode the images at the resolution of the run."
            )
        return KeepAway(self, start.denoiser, start.x.device)


class KeepAway(Mitigation):
    """The training images on the device of one run."""

    def __init__(self, settings: NearestNeighbour, denoiser: Denoiser, device: torch.device):
        super().__init__()
        self.settings, self.denoiser = settings, denoiser
        self._captions: dict[str, Conditioning] = {}  # as they come near
        with torch.inference_mode(False):  # a copy that autograd accepts
            self.latents = settings.latents.detach().to(device, copy=True)

    def guide(self, step: Step) -> Tensor | None:
        """Return the prediction of images that come too near; None when none does."""
        settings = self.settings
        if not (settings.despecification or settings.repulsion or self._deduplicates):
            return None
        guided = step.guided()
        near, images = self._nearest(widened(step.to_x0(guided)))
        too_near = near > settings.bound(step.percent)
        if not too_near.any():
            return None
        column = [-1, *[1] * (guided.ndim - 1)]
        # Eqs. 13 and 14: s_1 = max(min(c_1 sigma_t, s_0 - 1), 0), minus s_1 D.
        most = max(step.cond_scale - 1, 0.0)
        less = (settings.despecification * near).clamp(0, most)
        scale = (step.cond_scale - less).to(guided.dtype).view(column)
        milder = step.uncond + scale * (step.cond - step.uncond)
        if self._deduplicates:
            # Eqs. 15 and 16: s_2 = max(min(c_2 sigma_t, s_0 - s_1 - 1), 0), minus s_2 D of its
            # caption.
            away = (settings.deduplication * near).clamp(min=0).minimum(most - less)
            captions = [settings.captions[image] for image in images.tolist()]
            away = away * torch.tensor([bool(text) for text in captions], device=away.device)
            theirs = step.predict(self._encoded(captions)) - step.uncond
            milder = milder - away.to(guided.dtype).view(column) * theirs
        if settings.repulsion > 0:
            milder = step.from_x0(self._away(widened(step.to_x0(milder)))).to(guided.dtype)
        return torch.where(too_near.view(column), milder, guided)

    @property
    def _deduplicates(self) -> bool:
        return self.settings.deduplication > 0 and any(self.settings.captions)

    def _encoded(self, captions: Sequence[str]) -> Conditioning:
        """Return captions as the network reads them, each encoded once."""
        for text in captions:
            if text not in self._captions:
                self._captions[text] = self.denoiser.encode([text])
        return concatenate([self._captions[text] for text in captions])

    def _nearest(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Return the similarity of each image with its nearest training image, and which it is."""
        return self.settings.similarity(x0, self.latents.to(x0.dtype)).max(1)

    def _away(self, x0: Tensor) -> Tensor:
        """Return clean latents moved down the gradient of the similarity (Eq. 17, modified)."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x0.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self._nearest(leaf)[0].sum(), leaf)
        length = self.settings.repulsion * x0.flatten(1).norm(dim=1)
        direction = normalize(gradient.flatten(1), dim=1).view_as(x0)
        return x0 - length.view(-1, *[1] * (x0.ndim - 1)) * direction


def _centred(latents: Tensor) -> Tensor:
    """Return unit vectors of latents without the mean of each channel, [row element]."""
    flat = latents.flatten(2)
    return normalize((flat - flat.mean(2, keepdim=True)).flatten(1), dim=1)
