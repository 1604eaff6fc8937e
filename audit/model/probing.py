"""The residual probe on known training images: does one still come out of an optimised embedding?

Mitigating while sampling leaves the weights alone, so what they hold can be sought without the
prompt. The mirror image is sought as well: it has the same colours and shapes and was not trained
on, so what comes back of it is what any image would give. Where training flipped images it is no
control.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from ...shared.files.storage import replace_atomically
from ...shared.mitigation.method import Method, Mitigation, Start
from ...shared.mitigation.residual import residual_probe
from ...shared.sampling.guard import guard
from ...shared.score.denoiser import Conditioning
from ..common.similarity import PIXELS, Reference
from .comparison import Comparer
from .config import AuditConfig
from .trials import Probed, Sought

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...shared.models.adapter import PipelineDenoiser


class Given(Method):
    """Sample with one embedding, whatever the prompt says."""

    name: ClassVar[str] = "given"

    def __init__(self, cond: Conditioning):
        self.cond = cond

    def start(self, start: Start) -> Mitigation:
        """Return the embedding for every image."""
        return Mitigation(cond=self.cond[[0] * len(start.cond)])


def probe_prompt(
    denoiser: "PipelineDenoiser", comparer: Comparer, config: AuditConfig, prompt: str,
    seeds: Sequence[int], name: str,
) -> Probed | None:  # fmt: skip
    """Seek the training image of a prompt and its mirror image; None when no image is known.

    Args:
        denoiser: The model.
        comparer: Knows the training images and writes into the folder of the job.
        config: How images are sampled.
        prompt: Whose image is sought; the search starts from the empty prompt.
        seeds: Of the pictures sampled with what was found.
        name: Start of the pictures' names.
    """
    found = comparer.known.image(prompt)
    if found is None:
        return None
    from PIL import ImageOps

    image, mirrored = found, ImageOps.mirror(found)
    known = comparer.known
    if comparer.reference.features is not PIXELS:  # SSCD knows mirror images again
        comparer = Comparer(known, comparer.folder, features=PIXELS)
    limit = comparer.threshold
    own = {i for i, caption in enumerate(known.captions) if caption == prompt}
    seek = _Search(denoiser, config, comparer.folder, tuple(seeds), limit)
    training = seek(image, comparer.reference, own, f"{name}-residual")
    # A symmetric picture is its own mirror image, and no control.
    (hit,) = comparer.reference.nearest([mirrored])
    mirror = None
    if limit is not None and hit.ratio >= limit:
        reference = Reference([*known.thumbnails, mirrored])
        mirror = seek(mirrored, reference, {len(known.thumbnails)}, f"{name}-mirror")
    return Probed(training=training, mirror=mirror)


class _Search:
    """Seeks one image after the other with the same settings."""

    def __init__(
        self, denoiser: "PipelineDenoiser", config: AuditConfig, folder: Path,
        seeds: tuple[int, ...], limit: float | None,
    ):  # fmt: skip
        self.denoiser, self.config, self.folder = denoiser, config, folder
        self.seeds, self.limit = seeds, limit

    def __call__(self, image: "Image", reference: Reference, own: set[int], name: str) -> Sought:
        """Return what an embedding optimised towards `image` gives; `own` are its rows."""
        residual = residual_probe(
            self.denoiser, self.denoiser.encode_images([image])[0],
            start=self.denoiser.unconditional(), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        with guard(self.denoiser.pipeline, method=Given(residual.cond), gate="always"):
            pictures = self.denoiser.generate(
                [""] * len(self.seeds), self.seeds, steps=self.config.generation_steps,
                cond_scale=self.config.detection.cond_scale,
            )  # fmt: skip
        paths = tuple(f"images/{name}-seed{seed}.png" for seed in self.seeds)
        for path, picture in zip(paths, pictures, strict=True):
            with replace_atomically(self.folder / path) as part:
                picture.save(part, format="PNG")
        hits = reference.nearest(pictures)
        return Sought(
            loss_before=residual.loss_before, loss_after=residual.loss_after, images=paths,
            copied=tuple(
                None if self.limit is None else hit.index in own and hit.ratio < self.limit
                for hit in hits
            ),
        )  # fmt: skip
