"""The residual probe on known training images: does one still come out of an optimised embedding?

Mitigation while sampling leaves the weights alone, so an image that they hold can come back without
its prompt. The mirror image is the control: it has the same colours and shapes and was not trained
on, so it comes back as well as any image would. Where training flipped images it is no control.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from ...shared.copies.features import PIXELS
from ...shared.copies.neighbours import TrainingImages
from ...shared.files.images import save_png
from ...shared.mitigation.method import Method, Mitigation, Start
from ...shared.mitigation.residual import residual_probe
from ...shared.sampling.guard import guard
from ...shared.score.denoiser import Conditioning
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
    seeds: Sequence[int], name: str, others: Sequence[tuple[str, str]],
) -> Probed | None:  # fmt: skip
    """Probe for the training image of a prompt and for its mirror image; None without an image.

    Args:
        denoiser: The model.
        comparer: Knows the training images and writes into the folder of the job.
        config: How images are sampled.
        prompt: Whose image is probed for; the search starts from the empty prompt.
        seeds: Of the images sampled with the optimised embedding.
        name: Start of those images' names.
        others: Images of other prompts, as pairs of prompt and path, that tell what a copy is.
    """
    known, folder = comparer.known, comparer.folder
    image = known.image(prompt)
    if image is None:
        return None
    from PIL import ImageOps

    if comparer.features is not PIXELS:  # SSCD recognises mirror images
        comparer = Comparer(known, folder, features=PIXELS)
    others = [pair for pair in others if pair[0] != prompt]

    def own_copies(
        training: TrainingImages, caption: str, paths: Sequence[str]
    ) -> list[bool | None]:
        judged = comparer.judge([*((caption, path) for path in paths), *others], training)
        return [verdict.copied and verdict.is_own for verdict in judged.verdicts[: len(paths)]]

    def search(image: "Image", training: TrainingImages, caption: str, role: str) -> Search:
        """Optimise an embedding towards `image`, which stands under `caption` in `training`."""
        residual = residual_probe(
            denoiser, denoiser.encode_images([image])[0],
            start=denoiser.unconditional(), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        paths = {seed: f"images/{name}-{role}-seed{seed}.png" for seed in seeds}
        with guard(denoiser.pipeline, method=FixedEmbedding(residual.cond), gate="always"):
            sample(denoiser, config, "", folder, paths)
        return Search(
            loss_before=residual.loss_before, loss_after=residual.loss_after,
            images=tuple(paths.values()),
            copied=tuple(own_copies(training, caption, list(paths.values()))),
        )  # fmt: skip

    training = search(image, comparer.training, prompt, "residual")
    mirrored = ImageOps.mirror(image)
    save_png(mirrored, folder / f"images/{name}-mirrored.png")
    (symmetric,) = own_copies(comparer.training, prompt, [f"images/{name}-mirrored.png"])
    mirror = None
    if symmetric is False:  # a symmetric image is its own mirror image
        caption = f"{prompt} (mirrored)"
        with_mirror = TrainingImages(
            torch.cat([comparer.training.rows, PIXELS.rows([mirrored])]),
            [*known.captions, caption],
        )  # fmt: skip
        mirror = search(mirrored, with_mirror, caption, "mirror")
    return Probed(training=training, mirror=mirror)
