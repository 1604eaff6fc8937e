"""Captions of the demo drawn with every way of mitigating, and what the pictures are worth."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from figures import Figure, mean_of, plain, share_of
from PIL import Image
from unmemorize import demo
from unmemorize.audit.common.sscd import Sscd, similarity
from unmemorize.audit.model.demo_check import make_judge
from unmemorize.demo import data
from unmemorize.shared.files.storage import Journal, replace_atomically
from unmemorize.shared.mitigation import METHODS, make_method
from unmemorize.shared.sampling.guard import guard
from unmemorize.shared.score.calibration import Calibration

NONE = "none"
STEPS, COND_SCALE = 30, 7.5
SEEDS = (0, 1, 2, 3)
DRAWINGS = ("noto", "twemoji")
"""Vendors whose drawings show the caption without being the training image."""
GROUND = "#808080"
VARIANTS: dict[str, dict[str, object]] = {
    "delayed_static": {"mode": "static"},
    "delayed_opposite": {"mode": "static", "start_percent": 0.35, "opposite_scale": -2.0},
}
"""Of delayed guidance, besides the dynamic one: the paper's, by their settings."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The pictures of one caption, drawn one way."""

    caption: data.Caption
    images: list[Image.Image]
    seconds: float
    """Per image."""
    score: float | None
    """Of the gate's probe."""


def encode_training_images(denoiser) -> torch.Tensor:
    """Return the latents [image 4 16 16] of the repeated images, as nearest neighbours need."""
    repeated = [c.text for c in demo.captions() if c.group in ("verbatim", "template")]
    pixels = [np.array(demo.training_image(text)) for text in repeated]
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = denoiser.pipeline.vae
    with torch.inference_mode():
        return vae.encode(batch).latent_dist.mode() * vae.config.scaling_factor


def ways(denoiser) -> dict[str, Callable]:
    """Return, by name, what makes each method; sampling as usual comes first."""
    made: dict[str, Callable] = {NONE: lambda: None}
    latents = encode_training_images(denoiser)
    for name in METHODS:
        given = {"latents": latents} if name == "neighbour" else {}
        made[name] = lambda name=name, given=given: make_method(name, **given)
    for name, given in VARIANTS.items():
        made[name] = lambda given=given: make_method("delayed_guidance", **given)
    return made


class Studio:
    """Draws captions one way after the other and keeps what is drawn."""

    def __init__(self, denoiser, calibration: Calibration, folder: Path):
        self.denoiser, self.calibration, self.folder = denoiser, calibration, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(folder / "drawn.jsonl")

    def draw(self, way: str, method, caption: data.Caption) -> Drawn:
        """Return the pictures of a caption, from the folder when they are there."""
        name = way
        if quantile := getattr(method, "target_quantile", None):  # the calibration has a say
            name += f"-{self.calibration.seed_scores.flatten().quantile(quantile).item():.3f}"
        key = f"{name}/{caption.hexcode}"
        paths = [self.folder / f"{name}-{caption.hexcode}-{seed}.png" for seed in SEEDS]
        if key not in self.journal or not all(path.exists() for path in paths):
            sampling = nullcontext() if method is None else guard(
                self.denoiser.pipeline, method=method, calibration=self.calibration, gate="always"
            )  # fmt: skip
            start = time.perf_counter()
            with sampling as record:
                images = self.denoiser.generate(
                    [caption.text] * len(SEEDS), SEEDS, STEPS, COND_SCALE
                )
            seconds = (time.perf_counter() - start) / len(SEEDS)
            for path, image in zip(paths, images, strict=True):
                with replace_atomically(path) as part:
                    image.save(part, format="PNG")
            score = record.runs[-1].images[0].score_before if record else None
            self.journal.put(key, {"seconds": seconds, "score": score})
        kept = self.journal.get(key)
        images = [Image.open(path).convert("RGB") for path in paths]
        return Drawn(caption=caption, images=images, **kept)


class Critic:
    """Says how near pictures are to the training image, and to the caption's other drawings."""

    def __init__(self, art: data.Art, denoiser):
        self.art, self.sscd, self.judged = art, Sscd(), make_judge(denoiser)
        captions = demo.captions()
        self.drawings = {
            vendor: self.sscd.embed([self._drawing(c, vendor) for c in captions])
            for vendor in DRAWINGS
        }
        self.row = {caption.text: index for index, caption in enumerate(captions)}

    def _drawing(self, caption: data.Caption, vendor: str) -> Image.Image:
        image = Image.new("RGB", (data.RESOLUTION, data.RESOLUTION), GROUND)
        drawing = self.art.drawing(caption.hexcode, vendor).resize((96, 96))
        image.paste(drawing, (16, 16), drawing)
        return image

    def judge(self, one: Drawn) -> dict[str, float | None]:
        """Return the figures of a caption, means over its seeds."""
        embedded = self.sscd.embed(one.images)
        own = demo.training_image(one.caption.text)
        near = None if own is None else similarity(embedded, self.sscd.embed([own])).mean()
        return {
            "reproduced": self.judged.check(one.caption, one.images).reproduced,
            "similarity": None if near is None else float(near),
            "fidelity": self.fidelity(embedded, one.caption),
        }

    def fidelity(self, embedded: torch.Tensor, caption: data.Caption) -> float:
        """Return the share of other captions' drawings that are less similar, .5 is chance."""
        shares = []
        for drawings in self.drawings.values():
            near = similarity(embedded, drawings)
            own = near[:, self.row[caption.text]].unsqueeze(1)
            shares.append(((near < own).sum(1) / (near.shape[1] - 1)).mean().item())
        return statistics.mean(shares)


def gated(way: list[Drawn], plain: list[Drawn], threshold: float) -> list[Drawn]:
    """Return what a calibrated gate lets out: the method's pictures above the threshold only."""
    return [
        acted if acted.score > threshold else usual for acted, usual in zip(way, plain, strict=True)
    ]


def figures(critic: Critic, drawn: list[Drawn], usual: list[Drawn]) -> dict[str, Figure]:
    """Return one line of the table; without training images there is no similarity to any."""
    judged = [critic.judge(one) for one in drawn]
    near = [one["similarity"] for one in judged if one["similarity"] is not None]
    change = [
        float((np.asarray(a, np.float32) / 255 - np.asarray(b, np.float32) / 255).std())
        for one, other in zip(drawn, usual, strict=True)
        for a, b in zip(one.images, other.images, strict=True)
    ]
    ratios = [a.seconds / b.seconds for a, b in zip(drawn, usual, strict=True)]
    return {
        "reproduced": share_of([one["reproduced"] for one in judged]),
        **({"similarity": mean_of(near)} if near else {}),
        "fidelity": mean_of([one["fidelity"] for one in judged]),
        "change": mean_of(change),
        "seconds": plain(statistics.median(one.seconds for one in drawn), len(drawn)),
        "ratio": plain(statistics.median(ratios), len(ratios)),
    }
