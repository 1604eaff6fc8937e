"""From images of a concept to its adapter, accepted on images that it was not taught with.

Half of the visits leave the concept's name out of the caption, so that the adapter draws the
concept whether it is named or not. On other images it is taught the model's own prediction, so
that it does nothing there.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...files.weights import ModelError, file_sha256
from ...models.lora.files import Pair, read_lora
from ...score.detection import Progress
from ...score.noise_levels import noised
from ...wording import name_some
from .adapter import (
    ConceptAdapter,
    Pairs,
    adapted_layers,
    adding,
    not_learnt,
    weight_samples,
)
from .gain import NotEnoughImages, gains, line_above, without_names
from .images import HOLDOUT, CaptionedLatents

if TYPE_CHECKING:
    from ...models.adapter import PipelineDenoiser

STEPS, RANK, RATE = 60, 4, 2e-3
"""Of the adapter: steps of AdamW, rank, and the learning rate that a cosine starts from."""
FEWEST = 8
"""Images of a concept without which it is not learnt."""
ALIKE = 0.95
"""Cosine of two images' latents from which on they count as one image."""
AT_ONCE, LEVELS = 2, 2
"""Images of each side in one pass; passes of a step, each in its own half of the levels."""
SCHEDULE = 50
"""Noise levels of the schedule that a step draws from."""


class NothingLearnt(ModelError):
    """The adapter does not tell the concept's images from others that it was not taught with."""


@dataclass(frozen=True, kw_only=True)
class ConceptImages:
    """What an adapter is taught, and what it is measured on."""

    concept: CaptionedLatents
    """Images that show it, with unlike content."""
    others: CaptionedLatents
    """Images that lack it."""
    names: tuple[str, ...] = ()
    """What captions call it; empty for a concept without a name."""

    def __post_init__(self) -> None:
        count, unlike = len(self.concept.captions), distinct(self.concept.latents)
        if min(count, unlike) < FEWEST:
            found = (
                f"{count} images" if unlike == count else f"{unlike} of {count} images that differ"
            )
            raise NotEnoughImages(
                f"A concept is learnt from at least {FEWEST} images that have only the concept in "
                f"common, found {found}. Bring further ones with other content, 16 are good."
            )
        if len(self.others.captions) < 2 * FEWEST:
            raise NotEnoughImages(
                f"There are {len(self.others.captions)} images without the concept, at least "
                f"{2 * FEWEST} are needed: half are taught, half are measured on."
            )

    def caption(self, row: int, *, named: bool) -> str:
        """Return the caption of an image of the concept with its name, or without any."""
        bare = without_names(self.concept.captions[row], self.names)
        if not named or not self.names:
            return bare
        return self.concept.captions[row] if bare != self.concept.captions[row] else ", ".join(
            filter(None, (bare, self.names[0]))
        )  # fmt: skip


def distinct(latents: Tensor) -> int:
    """Return how many images are left when each that is like an earlier one is left out."""
    rows = nn.functional.normalize(latents.flatten(1).float(), dim=1)
    kept: list[int] = []
    for row in range(len(rows)):
        if not kept or float((rows[kept] @ rows[row]).max()) < ALIKE:
            kept.append(row)
    return len(kept)


def learn_concept(
    denoiser: "PipelineDenoiser",
    images: ConceptImages,
    *,
    steps: int = STEPS,
    rank: int = RANK,
    seed: int = 0,
    progress: Progress | None = None,
) -> ConceptAdapter:
    """Return an adapter that draws a concept, taught with three parts of its images.

    Args:
        denoiser: The model that will be trained; nothing of it is changed.
        images: The concept's, and others.
        steps: Of AdamW; each sees `AT_ONCE` images of each side at `LEVELS` noise levels.
        rank: Of the factors.
        seed: Of factors, images, noises and levels.
        progress: Called after each step.

    Raises:
        NothingLearnt: Measured on images that were held out; says what to bring.
    """
    network = denoiser.family.network
    layers = adapted_layers(network)
    generator = torch.Generator().manual_seed(seed)
    pairs = {name: _fresh(layer, rank, generator) for name, layer in layers.items()}
    placed = {name: (layer, 0) for name, layer in layers.items()}
    optimizer = torch.optim.AdamW([f for pair in pairs.values() for f in pair], weight_decay=0.0)
    lesson = _Lesson(denoiser, images, partial(adding, placed, lambda name, _: pairs[name]),
                     generator)  # fmt: skip
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        lesson.gradients()
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(1)
    taught = {name: (a.detach().cpu(), b.detach().cpu()) for name, (a, b) in pairs.items()}
    made = {"from": "images", "steps": steps, "rank": rank, "rate": RATE, "seed": seed,
            "name_left_out": 0.5 if images.names else 1.0}  # fmt: skip
    return accept(denoiser, images, taught, made)


def concept_of_lora(
    denoiser: "PipelineDenoiser", images: ConceptImages, path: Path
) -> tuple[ConceptAdapter, tuple[str, ...]]:
    """Return a published LoRA of a concept as its adapter, and the modules that are left out.

    Its change of the network is taken; text encoders keep what they read.

    Raises:
        ModelError: The file is no LoRA of plain factors for this model.
        NothingLearnt: It does not draw what the images show.
    """
    file = read_lora(denoiser.pipeline, path)
    network = "unet" if hasattr(denoiser.pipeline, "unet") else "transformer"
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    left = list(file.embeddings)
    for (component, name), module in file.modules.items():
        if component != network:
            left.append(f"{component}.{name}")
            continue
        if not isinstance(module, Pair) or module.magnitude is not None:
            raise ModelError(
                f"{path} is no LoRA of plain factors ({component}.{name}), which a concept's "
                "adapter is. Learn one from images: leave --from-lora out."
            )
        pairs[name] = module.a.float(), module.b.flatten(1).float() * module.scaling
    made = {"from": "LoRA", "file": path.name, "sha256": file_sha256(path)}
    return accept(denoiser, images, pairs, made, taught=False), tuple(left)


def accept(
    denoiser: "PipelineDenoiser",
    images: ConceptImages,
    pairs: Pairs,
    made: Mapping[str, Any],
    *,
    taught: bool = True,
) -> ConceptAdapter:
    """Return an adapter with the numbers that show what it learnt.

    Args:
        denoiser: The model.
        images: The concept's, and others; where the adapter was `taught` with them, the numbers are
            of those that were held out.
        pairs: The factors.
        made: How.
        taught: Whether it was.

    Raises:
        NothingLearnt: See `ConceptAdapter.load`.
    """
    network = denoiser.family.network
    live = dict(network.named_modules())
    absent = [name for name in pairs if name not in live]
    if absent:
        raise ModelError(f"This model has no layer {name_some(absent, 3)}.")
    placed = {name: (live[name], 0) for name in pairs}
    on = partial(adding, placed, lambda name, like: tuple(f.to(like) for f in pairs[name]))
    sides = {"concept": images.concept, "others": images.others}
    if taught:
        sides = {"concept": images.concept.part(holdout=True), "others": halves(images.others)[1]}
    found = {
        name: gains(denoiser, on, side.latents,
                    [without_names(caption, images.names) for caption in side.captions])
        for name, side in sides.items()
    }  # fmt: skip
    numbers = numbers_of(found["concept"], found["others"])
    if fault := not_learnt(numbers):
        raise NothingLearnt(f"No concept was made: {fault}")
    model = {
        "sha256": denoiser.fingerprint,
        "pipeline": type(denoiser.pipeline).__name__,
        "network": type(network).__name__,
        "parametrization": denoiser.parametrization,
    }
    counts = {
        "concept_images": len(images.concept.captions),
        "other_images": len(images.others.captions),
    }
    account = {"model": model, "names": list(images.names), "made": {**made, **counts},
               "numbers": numbers}  # fmt: skip
    return ConceptAdapter(
        pairs=pairs, account=account, samples=weight_samples(network, placed, pairs)
    )


def numbers_of(concept: Tensor, others: Tensor) -> dict[str, Any]:
    """Return the numbers of an account, from gains on images that the adapter was not taught."""
    line = line_above(others)
    rest = [torch.cat([others[:i], others[i + 1 :]]) for i in range(len(others))]
    above = [bool(gain > line_above(others)) for gain, others in zip(others, rest, strict=True)]
    return {
        "concept": float(concept.mean()),
        "others": float(others.mean()),
        "threshold": line,
        "recall": float((concept > line).double().mean()),
        "false_positives": sum(above) / len(above),
        "concept_gains": [float(f"{gain:.4g}") for gain in concept],
        "other_gains": [float(f"{gain:.4g}") for gain in others],
    }


def halves(images: CaptionedLatents) -> tuple[CaptionedLatents, CaptionedLatents]:
    """Return every other image to teach with, and the rest to measure on."""
    return tuple(
        CaptionedLatents(latents=images.latents[place::2], captions=images.captions[place::2])
        for place in (0, 1)
    )  # type: ignore[return-value]


class _Lesson:
    """The gradients of one step, again and again."""

    def __init__(
        self,
        denoiser: "PipelineDenoiser",
        images: ConceptImages,
        on: Callable[[], AbstractContextManager[None]],
        generator: torch.Generator,
    ):
        self.denoiser, self.images, self.on, self.generator = denoiser, images, on, generator
        self.concept, self.others = images.concept.part(holdout=False), halves(images.others)[0]
        count = len(images.concept.captions)
        self.rows = [row for row in range(count) if row % HOLDOUT != HOLDOUT - 1]
        self.sigmas = denoiser.sigmas(SCHEDULE)[:-1]
        captions = [
            images.caption(row, named=named) for row in self.rows for named in (False, True)
        ]
        self.captions = list(dict.fromkeys([*captions, *self.others.captions]))
        self.cond = denoiser.encode(self.captions)

    def gradients(self) -> None:
        """Add the gradients of a step's loss to the factors."""
        part = len(self.sigmas) // LEVELS
        for number in range(LEVELS):
            sigma = self.sigmas[number * part + self._drawn(part)[0]]
            ours = self._drawn(len(self.rows), AT_ONCE)
            theirs = self._drawn(len(self.others.captions), AT_ONCE)
            named = self._drawn(2, AT_ONCE)
            captions = [self.images.caption(self.rows[row], named=bool(yes))
                        for row, yes in zip(ours, named, strict=True)]  # fmt: skip
            captions += [self.others.captions[row] for row in theirs]
            clean = torch.cat([self.concept.latents[ours], self.others.latents[theirs]])
            noise = torch.randn(clean.shape, generator=self.generator).to(clean)
            sigma = sigma.to(clean)
            noisy = noised(self.denoiser.parametrization, clean, noise, sigma)
            cond = self.cond[[self.captions.index(caption) for caption in captions]]
            target = clean.clone()
            with torch.no_grad():
                rest = cond[list(range(AT_ONCE, 2 * AT_ONCE))]
                target[AT_ONCE:] = self.denoiser.denoise(noisy[AT_ONCE:], sigma, rest)
            with torch.enable_grad(), self.on():
                x0 = self.denoiser.denoise(noisy, sigma, cond)
            # The sum: Adam ignores the scale of a loss, and in half precision the gradients of
            # the mean would vanish.
            ((x0 - target) / sigma).float().square().sum().backward()

    def _drawn(self, count: int, number: int = 1) -> list[int]:
        return torch.randint(count, (number,), generator=self.generator).tolist()


def _fresh(
    layer: nn.Linear, rank: int, generator: torch.Generator
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the factors of a layer before the first step, where their product is 0."""
    device = layer.weight.device
    a = torch.randn(rank, layer.in_features, generator=generator) / math.sqrt(layer.in_features)
    b = torch.zeros(layer.out_features, rank)
    return nn.Parameter(a.to(device)), nn.Parameter(b.to(device))
