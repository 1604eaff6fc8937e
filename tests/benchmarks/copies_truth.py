"""Which generations are copies for an eye: what the rules of copies are held against.

A planted caption *comes back* when the image from each of its seeds is its training image again:
their pixels, 8 x 8 of them, correlate more than those of 95 in 100 pairs of two training images of
one learnt caption, which show the same thing twice. An autoencoder's blur is left aside that way,
and so are brightness and contrast, which guidance changes: an eye forgives them all. Measure and
yardstick are not those of the rules, which compare distances with what other prompts' generations
reach, and which image is nearest plays no part. Two images of one caption pass for one in 5 % of
cases, and from both seeds in less.

All images of captions that come back are positives. The other planted captions are no truth for a
rule, for an eye hesitates too: they are drawn and judged along, and count on neither side.
Negatives are learnt and held-out captions that are not near a planted one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from bench_models import BenchModel
from bench_models.truth import SIDE
from PIL import Image
from scores.case import Case
from scores.generations import SEEDS, drawn
from torch import Tensor
from unmemorize.audit.common.copies import OTHERS
from unmemorize.shared.files.images import read_image

SHARE = 0.95
"""Of pairs of training images of one caption that a copy is more alike than."""
COARSE = 8
"""Pixels a side that images are compared at."""


@dataclass(frozen=True, kw_only=True)
class Generations:
    """What a model drew for some of its captions, and which of the images are copies."""

    prompts: list[str]
    images: list[Image.Image]
    copied: list[bool | None]
    """For an eye; None where it hesitates."""

    def __add__(self, more: "Generations") -> "Generations":
        """Return both, in this order."""
        return Generations(
            prompts=self.prompts + more.prompts, images=self.images + more.images,
            copied=self.copied + more.copied,
        )  # fmt: skip


def patterns(images: np.ndarray) -> Tensor:
    """Return images [image 32 32 3] uint8 as rows whose products are correlations of pixels.

    Of `COARSE` pixels squared, each colour channel centred: a ground of one colour says nothing.
    """
    rows = torch.from_numpy(images).double().unflatten(2, (COARSE, -1)).unflatten(1, (COARSE, -1))
    rows = rows.mean((2, 4))
    rows = (rows - rows.mean((1, 2), keepdim=True)).flatten(1)
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)


def least_correlation(model: BenchModel) -> float:
    """Return what `SHARE` of all pairs of training images of one learnt caption stay below."""
    images, captions = model.images(), model.captions()
    pairs = []
    for index, caption in enumerate(captions):
        if caption.group == "learnt":
            rows = patterns(images.pixels[images.caption_of == index])
            pairs.append((rows @ rows.T)[tuple(torch.triu_indices(len(rows), len(rows), 1))])
    return float(np.quantile(torch.cat(pairs).numpy(), SHARE))


def seeds_that_come_back(model: BenchModel, generations: Generations) -> dict[str, list[bool]]:
    """Return by caption, for each of its images, whether it is the caption's training image."""
    least, found = least_correlation(model), {}
    for prompt, image in zip(generations.prompts, generations.images, strict=True):
        own = patterns(model.training_images(prompt))
        row = patterns(np.array(image.resize((SIDE, SIDE), Image.Resampling.BOX))[None])
        found.setdefault(prompt, []).append((row @ own.T).max().item() > least)
    return found


def draw_planted(case: Case, texts: Sequence[str]) -> list[bool]:
    """Return which captions draw one and the same repeated training image from all seeds."""
    captions = case.model.captions()
    repeated = [c.text for c in captions if c.group in ("verbatim", "template")]
    planted = patterns(np.concatenate([case.model.training_images(text) for text in repeated]))
    least, found = least_correlation(case.model), []
    for text in texts:
        images = [read_image(path) for path in drawn(case, [text]).values()]
        small = [np.array(image.resize((SIDE, SIDE), Image.Resampling.BOX)) for image in images]
        alike = (patterns(np.stack(small)) @ planted.T).amin(0)
        found.append(alike.max().item() > least)
    return found


def generations_of(
    case: Case, texts: Sequence[str], seeds: Sequence[int], copied: bool | None
) -> Generations:
    """Return the images of captions, of all of which the same is true."""
    paths = drawn(case, texts, seeds)
    return Generations(
        prompts=[text for text, _ in paths], images=[read_image(p) for p in paths.values()],
        copied=[copied] * len(paths),
    )  # fmt: skip


def ask(case: Case, planted: int, others: int) -> tuple[Generations, dict[str, list[bool]]]:
    """Return what the rules are asked about, and which seeds of planted captions come back.

    Args:
        case: The model.
        planted: Captions at most, from all seeds.
        others: Learnt captions at most, and held-out ones, from the first seed.

    Raises:
        ValueError: These are too few captions for any verdict.
    """
    captions = case.model.captions()
    chosen = {
        group: [c.text for c in captions if c.group == group and not c.near][:number]
        for group, number in (("verbatim", planted), ("learnt", others), ("held_out", others))
    }
    if (count := sum(map(len, chosen.values()))) <= OTHERS:
        raise ValueError(
            f"{count} captions are too few to tell what a copy is, which needs {OTHERS} others "
            "beside each: ask for more."
        )
    first = generations_of(case, chosen["verbatim"], SEEDS, copied=None)
    back = seeds_that_come_back(case.model, first)
    truth = [True if all(back[prompt]) else None for prompt in first.prompts]
    first = Generations(prompts=first.prompts, images=first.images, copied=truth)
    rest = generations_of(case, chosen["learnt"] + chosen["held_out"], SEEDS[:1], copied=False)
    return first + rest, back
