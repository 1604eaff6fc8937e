"""The extraction attack from a base model to its LoRA: FineXtract (ICML 2025).

Sampling is guided away from what the base model expects and towards what the LoRA adds, so that the
images it was trained on come out; images that come out again and again agree with each other.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ...shared.arrays import Float, Tensor
from ...shared.score.trajectory import guided_step
from .result import Attack, Clique, Generation, Rate

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...shared.models.adapter import PipelineDenoiser

GUIDANCE = 5.0
"""w for a LoRA; the paper takes 3 for models that were fine-tuned as a whole."""
AGREE = 0.8
"""Cosine from which on two generations agree; what a clique is, its central member says."""
SMALLEST = 3
"""Members of a clique that counts: two images may agree by chance."""


@torch.inference_mode()
def sample_attack(
    denoiser: "PipelineDenoiser", prompts: Sequence[str], seeds: Sequence[int], steps: int
) -> "list[list[Image]]":
    """Return a clip per prompt and seed, by DDIM (Euler for flows); images are one frame.

    Args:
        denoiser: With the LoRA on; it is switched off for every other prediction.
        prompts: As many as `seeds`.
        seeds: Starting noises, those of ordinary sampling.
        steps: Denoising steps.
    """
    sigmas = denoiser.sigmas(steps)
    x, cond = denoiser.initial_noise(seeds, sigmas[0]), denoiser.encode(prompts)
    with denoiser.lora_disabled():
        empty = denoiser.unconditional()[[0] * len(seeds)]
    for sigma, sigma_next in pairwise(sigmas):
        with denoiser.lora_disabled():
            base = denoiser.denoise(x, sigma, empty)
        # e_base(0) + w (e_lora(c) - e_base(0)), which is linear in x0 for all parametrizations.
        x = guided_step(x, base, denoiser.denoise(x, sigma, cond), sigma, sigma_next, GUIDANCE)
    return as_clips(denoiser.decode(x))


def as_clips(pixels: Float[Tensor, "clip 3 *place"]) -> "list[list[Image]]":
    """Return the frames of each of some clips [clip 3 frame height width] or images, in 0..1."""
    clips = pixels if pixels.ndim == 5 else pixels.unsqueeze(2)
    return [as_images(clip.movedim(1, 0)) for clip in clips]


def as_images(pixels: Float[Tensor, "image 3 height width"]) -> "list[Image]":
    """Return pixels in 0..1 as PIL images."""
    from PIL import Image

    bytes_ = (pixels * 255).round().byte().movedim(1, -1).cpu().numpy()
    return [Image.fromarray(values) for values in bytes_]


def judge_attack(
    rows: Float[Tensor, " generation dimension"],
    generations: Sequence[Generation],
    trained: int,
) -> Attack | None:
    """Return the cliques of the attack's generations and the training images they are.

    Two generations agree above `AGREE`; a clique is one of the `trained` training images where its
    central member is a copy.
    """
    places = [i for i, generation in enumerate(generations) if generation.asked == "attack"]
    if not places:
        return None
    results = []
    for members in cliques(rows[places], AGREE):
        member = generations[places[central(rows[places], members)]]
        results.append(Clique(
            size=len(members), member=member.path, nearest=member.nearest,
            similarity=member.similarity,
            extracted=member.mark == "verbatim",
        ))  # fmt: skip
    out = {clique.nearest for clique in results if clique.extracted}
    return Attack(generations=len(places), guidance=GUIDANCE, cliques=tuple(results),
                  extracted=Rate.of(len(out), trained))  # fmt: skip


def cliques(rows: Float[Tensor, " image dimension"], threshold: float) -> list[list[int]]:
    """Return groups in which every two images are at least `threshold` similar, largest first.

    No image is in two groups. To find the fewest such groups is hard, so a greedy colouring of
    the pairs that are *not* similar stands for it (DSATUR); groups below `SMALLEST` are left out.
    Rows are unit vectors, and the threshold is a cosine.
    """
    import networkx

    unlike = networkx.Graph()
    unlike.add_nodes_from(range(len(rows)))
    unlike.add_edges_from((rows @ rows.T < threshold).triu(1).nonzero().tolist())
    colours = networkx.greedy_color(unlike, strategy="saturation_largest_first")
    groups: dict[int, list[int]] = {}
    for image in range(len(rows)):
        groups.setdefault(colours[image], []).append(image)
    large = [group for group in groups.values() if len(group) >= SMALLEST]
    return sorted(large, key=lambda group: (-len(group), group))


def central(rows: Float[Tensor, " image dimension"], members: Sequence[int]) -> int:
    """Return the member that is nearest to the mean of all."""
    mean = rows[list(members)].mean(0)
    return members[int((rows[list(members)] @ mean).argmax())]
