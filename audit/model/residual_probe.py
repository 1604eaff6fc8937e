"""The residual probe on known training images: does one still come out of an optimised embedding?

Mitigation while sampling leaves the weights alone, so an image that they hold can come back without
its prompt. The mirror image is the control: it has the same colours and shapes and was not trained
on, so it comes back as well as any image would. Where training flipped images it is no control.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from ...shared.mitigation.method import Method, Mitigation, Start
from ...shared.mitigation.residual import residual_probe
from ...shared.sampling.guard import guard
from ...shared.score.denoiser import Conditioning
from ..common.similarity import PIXELS, Reference
from .comparison import Comparer
from .config import AuditConfig
from .images import sample
from .mitigation_result import Probed, Search

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...shared.models.adapter import PipelineDenoiser


class FixedEmbedding(Method):
    """Sample with one embedding, whatever the prompt says."""

    name: ClassVar[str] = "fixed embedding"

    def __init__(self, cond: Conditioning):
        self.cond = cond

    def start(self, start: Start) -> Mitigation:
        """Return the embedding for every image."""
        return Mitigation(cond=self.cond[[0] * len(start.cond)])


def probe_prompt(
    denoiser: "PipelineDenoiser", comparer: Comparer, config: AuditConfig, prompt: str,
    seeds: Sequence[int], name: str,
) -> Probed | None:  # fmt: skip
    """Probe for the training image of a prompt and for its mirror image; None without an image.

    Args:
        denoiser: The model.
        comparer: Knows the training images and writes into the folder of the job.
        config: How images are sampled.
        prompt: Whose image is probed for; the search starts from the empty prompt.
        seeds: Of the images sampled with the optimised embedding.
        name: Start of those images' names.
    """
    known, folder = comparer.known, comparer.folder
    image = known.image(prompt)
    if image is None:
        return None
    from PIL import ImageOps

    if comparer.reference.features is not PIXELS:  # SSCD recognises mirror images
        comparer = Comparer(known, folder, features=PIXELS)
    limit = comparer.threshold

    def search(image: "Image", reference: Reference, own: set[int], role: str) -> Search:
        """Optimise an embedding towards `image`, whose rows in the reference are `own`."""
        residual = residual_probe(
            denoiser, denoiser.encode_images([image])[0],
            start=denoiser.unconditional(), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        paths = {seed: f"images/{name}-{role}-seed{seed}.png" for seed in seeds}
        with guard(denoiser.pipeline, method=FixedEmbedding(residual.cond), gate="always"):
            hits = reference.nearest(sample(denoiser, config, "", folder, paths))
        return Search(
            loss_before=residual.loss_before, loss_after=residual.loss_after,
            images=tuple(paths.values()),
            copied=tuple(
                None if limit is None else hit.index in own and hit.ratio < limit for hit in hits
            ),
        )  # fmt: skip

    own = {i for i, caption in enumerate(known.captions) if caption == prompt}
    training = search(image, comparer.reference, own, "residual")
    mirrored = ImageOps.mirror(image)
    (hit,) = comparer.reference.nearest([mirrored])
    mirror = None
    if limit is not None and hit.ratio >= limit:  # a symmetric image is its own mirror image
        reference = Reference([*known.thumbnails, mirrored])
        mirror = search(mirrored, reference, {len(known.thumbnails)}, "mirror")
    return Probed(training=training, mirror=mirror)
