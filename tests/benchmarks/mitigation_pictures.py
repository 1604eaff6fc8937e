"""Captions of a model drawn with every way of mitigating, and what the pictures are worth."""

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_models.recipes import RECIPES
from figures import Figure, mean_of, plain, share_of
from PIL import Image
from scores.case import Case
from scores.generations import training_of
from torch import Tensor
from unmemorize import demo
from unmemorize.audit.common.copies import judge
from unmemorize.audit.common.sscd import Sscd, similarity
from unmemorize.demo import data
from unmemorize.shared.copies.features import PIXELS
from unmemorize.shared.files.images import read_image, save_png
from unmemorize.shared.files.storage import Journal
from unmemorize.shared.mitigation import METHODS, make_method
from unmemorize.shared.mitigation.method import Method
from unmemorize.shared.sampling.guard import guard
from unmemorize.shared.score.calibration import Calibration

NONE = "none"
STEPS, COND_SCALE = 30, 7.5
SEEDS = (0, 1, 2, 3)
DRAWINGS = ("noto", "twemoji")
"""Vendors whose drawings show a caption of the demo without being the training image."""
GROUND = "#808080"
FRESH = 9_000_000
"""First seed of drawings that no model was trained on."""
COMPARED = 200
"""Captions whose drawings an image is compared with, at most."""
FAINT = 0.02
"""Share of unmitigated images of other prompts that count as blank."""
VARIANTS: dict[str, dict[str, object]] = {
    "delayed_static": {"method": "delayed_guidance", "mode": "static"},
    "delayed_opposite": {
        "method": "delayed_guidance", "mode": "static", "start_percent": 0.35,
        "opposite_scale": -2.0,
    },
}  # fmt: skip
"""Methods with other settings than their own, by a name for them."""
WAYS = (NONE, *METHODS, *VARIANTS)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The pictures of one caption, drawn one way."""

    caption: str
    images: list[Image.Image]
    seconds: float
    """Of all of them, the gate and the method included; of the processor where it draws."""
    acted: bool
    score_after: float | None


class Studio:
    """Draws captions of a model one way after the other and keeps what is drawn."""

    def __init__(self, case: Case, folder: Path):
        self.case, self.folder = case, folder / case.folder.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.folder / "drawn.jsonl")

    @cached_property
    def calibration(self) -> Calibration:
        """Return the product's own calibration of the model, kept in the folder."""
        path = self.folder / "calibration.json"
        if not path.is_file():
            self.case.calibration.save(path)
        return Calibration.load(path)

    @cached_property
    def neighbours(self) -> Method:
        """Return the guidance away from the images that the planted captions repeat."""
        denoiser, model = self.case.subject.denoiser, self.case.model
        groups = self.case.groups
        captions = groups.of(groups.planted + groups.template)
        pictures = [
            demo.training_image(text) if model.name in demo.BUNDLED
            else Image.fromarray(model.training_images(text)[0])
            for text in captions
        ]  # fmt: skip
        return make_method(
            "neighbour", latents=denoiser.encode_images(pictures), captions=tuple(captions)
        )

    def method(self, way: str) -> Method | None:
        """Return what acts; None for sampling as usual."""
        if way == "neighbour":
            return self.neighbours
        settings: dict[str, Any] = dict(VARIANTS.get(way, {"method": way}))
        return None if way == NONE else make_method(settings.pop("method"), **settings)

    def draw(self, way: str, caption: str, seeds: Sequence[int] = SEEDS) -> Drawn:
        """Return the pictures of a caption, from the folder when they are there."""
        name = hashlib.sha256(caption.encode()).hexdigest()[:16]
        key, method = f"{way}/{len(seeds)}/{caption}", self.method(way)
        paths = [self.folder / f"{way}-{name}-{seed}.png" for seed in seeds]
        if key not in self.journal or not all(path.exists() for path in paths):
            denoiser, sampling = self.case.subject.denoiser, nullcontext()
            if method is not None:
                sampling = guard(denoiser.pipeline, method=method, calibration=self.calibration)
            # What else a shared processor does is nobody's cost.
            clock = time.process_time if denoiser.device.type == "cpu" else time.perf_counter
            with sampling as record:
                start = clock()
                images = denoiser.generate([caption] * len(seeds), seeds, STEPS, COND_SCALE)
                seconds = clock() - start
            for path, image in zip(paths, images, strict=True):
                save_png(image, path)
            first = record.runs[-1].images[0] if record else None
            self.journal.put(key, {
                "seconds": seconds, "acted": first is not None and first.fired,
                "score_after": first and first.score_after,
            })  # fmt: skip
        kept = self.journal.get(key)
        return Drawn(caption=caption, images=[read_image(path) for path in paths], **kept)


class Critic:
    """Says whether pictures copy any training image, show their caption, and are pictures at all.

    Args:
        case: The model.
        others: Unmitigated pictures of other prompts, at least 20 of them.
        art: Folder of the art's packages.
    """

    def __init__(self, case: Case, others: Sequence[Drawn], art: Path):
        self.case, self.sscd, self.training = case, Sscd(), training_of(case.model)
        self.others = [(one.caption, image) for one in others for image in one.images]
        self.other_rows = PIXELS.rows([image for _, image in self.others])
        self.draw = drawings_of(case, art)
        groups = case.groups
        some = groups.of([*groups.planted, *groups.template, *groups.negatives])
        self.texts = list(dict.fromkeys([*some[:COMPARED], *(one.caption for one in others)]))
        self.real: dict[str, Tensor] = {}  # [drawing dimension] by caption
        self.known = torch.stack([self.drawings(text) for text in self.texts], dim=1)
        self.least = self.least_of(self.others)

    @staticmethod
    def least_of(others: Sequence[tuple[str, Image.Image]]) -> tuple[float, float]:
        """Return the contrast and the detail that all but `FAINT` of other images have."""
        contrast, detail = zip(*(_faintness(image) for _, image in others), strict=True)
        return float(np.quantile(contrast, FAINT)), float(np.quantile(detail, FAINT))

    def drawings(self, caption: str) -> Tensor:
        """Return real drawings of a caption as SSCD sees them, unit vectors."""
        if caption not in self.real:
            self.real[caption] = self.sscd.embed(self.draw(caption))
        return self.real[caption]

    def copied(self, drawn: Sequence[Drawn]) -> list[bool]:
        """Return per image whether it reproduces any training image, own or another's."""
        pairs = [(one.caption, image) for one in drawn for image in one.images]
        rows = torch.cat([PIXELS.rows([image for _, image in pairs]), self.other_rows])
        prompts = [text for text, _ in (*pairs, *self.others)]
        verdicts = judge(rows, prompts, self.training, PIXELS.bounds).verdicts[: len(pairs)]
        if any(verdict.copied is None for verdict in verdicts):
            raise ValueError(f"{len(self.others)} other images are too few to tell copies by.")
        return [bool(verdict.copied) for verdict in verdicts]

    def fidelity(self, one: Drawn) -> float:
        """Return the share of other captions' drawings that are less similar, .5 is chance."""
        images, shares = self.sscd.embed(one.images), []
        for own, known in zip(self.drawings(one.caption), self.known, strict=True):
            near, near_own = similarity(images, known), similarity(images, own[None])
            less = (near < near_own).sum(1) / (len(self.texts) - (one.caption in self.texts))
            shares.append(less.clamp(max=1).mean().item())
        return statistics.mean(shares)

    def quality(self, drawn: Sequence[Drawn]) -> float:
        """Return the kernel distance of images to real drawings of the same captions.

        The unbiased squared MMD with KID's polynomial kernel, (x y + 1)^3, of SSCD's unit vectors;
        0 for images like the drawings.
        """
        images = self.sscd.embed([image for one in drawn for image in one.images])
        return kernel_distance(images, torch.cat([self.drawings(one.caption) for one in drawn]))

    def blank(self, drawn: Sequence[Drawn]) -> list[bool]:
        """Return per image whether contrast or detail is less than in other prompts' images."""
        contrast, detail = self.least
        values = [_faintness(image) for one in drawn for image in one.images]
        return [value[0] < contrast or value[1] < detail for value in values]

    def figures(self, drawn: Sequence[Drawn], usual: Sequence[Drawn]) -> dict[str, Figure]:
        """Return one line of the table."""
        seconds = [sum(one.seconds for one in way) for way in (drawn, usual)]
        copied = self.copied(drawn)
        return {
            "reproduced": share_of(copied),
            "fidelity": mean_of([self.fidelity(one) for one in drawn]),
            "quality": plain(self.quality(drawn), len(copied)),
            "blank": share_of(self.blank(drawn)),
            "time_ratio": plain(seconds[0] / seconds[1], len(drawn)),
            "acted": share_of([one.acted for one in drawn]),
        }


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """Return the unbiased squared MMD of two sets of rows, kernel (x y + 1)^3."""

    def within(rows: Tensor) -> Tensor:
        values = (rows @ rows.T + 1) ** 3
        return (values.sum() - values.diagonal().sum()) / (len(rows) * (len(rows) - 1))

    one, other = one.double(), other.double()
    return float(within(one) + within(other) - 2 * ((one @ other.T + 1) ** 3).mean())


def drawings_of(case: Case, art: Path) -> Callable[[str], list[Image.Image]]:
    """Return what draws a caption of a model anew: other vendors, or seeds never trained on."""
    name = case.model.name
    if name in demo.BUNDLED:
        vendors, by_text = data.Art(data.fetch(art)), {c.text: c for c in demo.captions()}
        return lambda text: [_drawing(vendors, by_text[text], vendor) for vendor in DRAWINGS]
    made = RECIPES[name].art(art)
    slots = {caption.text: caption.slots for caption in case.model.captions()}
    return lambda text: [
        Image.fromarray(made.render(slots[text], FRESH + k)) for k in range(len(DRAWINGS))
    ]


def _drawing(art: data.Art, caption: data.Caption, vendor: str) -> Image.Image:
    image = Image.new("RGB", (data.RESOLUTION, data.RESOLUTION), GROUND)
    drawing = art.drawing(caption.hexcode, vendor).resize((96, 96))
    image.paste(drawing, (16, 16), drawing)
    return image


def _faintness(image: Image.Image) -> tuple[float, float]:
    """Return contrast, the std of the pixels, and detail, their mean difference to the next."""
    pixels = np.asarray(image, np.float64) / 255
    detail = np.abs(np.diff(pixels, axis=0)).mean() + np.abs(np.diff(pixels, axis=1)).mean()
    return float(pixels.std()), float(detail)
