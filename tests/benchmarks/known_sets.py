"""Training folders of which is known what comes back, and what an audit of a LoRA says of them.

Whatever was drawn is judged by the audit's own functions, from files to headline; only the drawing
is done once for all folders of a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from unmemorize.audit.common.sscd import Sscd, similarity
from unmemorize.audit.lora.ask import Mode, Shot, groups_of, roles_of
from unmemorize.audit.lora.compare import References, evidence_of, pixel_references, views_on
from unmemorize.audit.lora.feature_cache import FeatureCache
from unmemorize.audit.lora.neighbours import duplicate_threshold, find_duplicates
from unmemorize.audit.lora.result import (
    Headline,
    ImageVerdict,
    PositiveControl,
    Rate,
    TrainingImage,
    TrainingSet,
)
from unmemorize.audit.lora.rule import mark
from unmemorize.audit.lora.verdicts import judge_images, summarize, thresholds
from unmemorize.shared.copies.features import PIXELS
from unmemorize.shared.files.images import ImageFiles
from unmemorize.shared.files.weights import file_sha256

WORKS = PositiveControl(found=Rate.of(8, 8), works=True, detail="Not measured here.")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A training image."""

    path: Path
    trip: Path
    """Of what the autoencoder makes of it."""
    caption: str
    back: bool = False
    """The truth: the LoRA gives it back, and the base model does not."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A generation."""

    path: Path
    prompt: str
    seed: int
    lora: bool


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an audit says of a folder."""

    verdicts: tuple[ImageVerdict, ...]
    headline: Headline

    @property
    def named(self) -> set[int]:
        """Return the positions of the images that come back."""
        return {v.image for v in self.verdicts if v.verdict == "verbatim"}

    @property
    def clean(self) -> bool:
        """Return whether the headline says that none came back."""
        return self.headline.given and not self.headline.reproduced.count


class Judge:
    """The instruments of an audit."""

    def __init__(self, work: Path):
        self.encoder = Sscd()
        self.cache = FeatureCache(self.encoder, work / "features")

    def judge(self, trained: Sequence[Trained], made: Sequence[Made]) -> Answer:
        """Return what an audit of this folder says that drew these images."""
        paths, trips = [t.path for t in trained], [t.trip for t in trained]
        files = [m.path for m in made]
        images = ImageFiles(paths)
        rows, of_trips, of_made = map(self.cache.rows, (paths, trips, files))
        sha256 = [file_sha256(path) for path in paths]
        training = TrainingSet(
            folder=paths[0].parent, layout="plain", trigger="",
            images=tuple(
                TrainingImage(name=t.path.name, sha256=key, caption=t.caption, repeats=1,
                              size=(1, 1))
                for t, key in zip(trained, sha256, strict=True)
            ),
        )  # fmt: skip
        limit = duplicate_threshold(images, self.encoder.embed)
        alike = find_duplicates(rows, sha256, limit, images)
        groups = groups_of(alike, len(paths))
        modes: dict[bool, Mode] = {True: "on", False: "off"}
        shots = [Shot(prompt=m.prompt, asked="caption" if m.prompt else "empty", source=None,
                      seed=m.seed, mode=modes[m.lora], stage="captions", path=m.path.name)
                 for m in made]  # fmt: skip
        marked = mark(
            views_on(pixel_references(images, ImageFiles(trips)), PIXELS.rows(ImageFiles(files)),
                     References(rows=rows, round_trips=of_trips), of_made),
            roles_of(shots, training, groups),
        )  # fmt: skip
        matrix = torch.maximum(similarity(of_made, rows), similarity(of_made, of_trips))
        evidence = evidence_of(shots, matrix, marked, groups, len(paths))
        limits = thresholds(min(marked.controls), len(paths), 0)
        verdicts = judge_images(evidence, (rows * of_trips).sum(1), enough=limits.enough)
        headline = summarize(verdicts, evidence, limits, WORKS, asked="captions")
        return Answer(verdicts=verdicts, headline=headline)


def saved(image: Image.Image, path: Path) -> Path:
    """Write an image unless it stands there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return path
