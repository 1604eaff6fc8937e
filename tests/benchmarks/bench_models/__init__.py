"""The five models of the benchmarks: the demo's two, and three with other art, made here.

Made once by `make bench-models`, 40 minutes each on two cores at most, and never committed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from unmemorize import demo
from unmemorize.demo.data import build_renderings
from unmemorize.shared.score.families import HALF, overlap

from .recipes import RECIPES
from .truth import Caption, Images, load_captions, load_images

FOLDER = Path(__file__).resolve().parents[3] / "build" / "models"


@dataclass(frozen=True)
class BenchModel:
    """A model with a known truth."""

    name: str
    model: str
    """What commands and `Subject` take: the name of a bundled model, or a diffusers folder."""
    folder: Path
    """Where its weights lie."""
    read_captions: Callable[[], list[Caption]]
    read_images: Callable[[], Images]

    def captions(self) -> list[Caption]:
        """Return all captions with their groups, and for near ones whom they are near."""
        self.require()
        return self.read_captions()

    def images(self) -> Images:
        """Return all training images, and fresh ones like them, 32 pixels squared."""
        self.require()
        return self.read_images()

    def training_images(self, caption: str) -> np.ndarray:
        """Return the training images [image 32 32 3] uint8 of a caption; none of a held-out one."""
        images, texts = self.images(), [c.text for c in self.captions()]
        return images.pixels[images.caption_of == texts.index(caption)]

    def require(self) -> None:
        """Raise FileNotFoundError if the model was not made yet."""
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder} is missing: `make bench-models` makes the benchmarks' own."
            )


@cache
def demo_captions() -> list[Caption]:
    """Return the demo's captions; near is what shares half of its words with a repeated one."""
    repeated = [c.text for c in demo.captions() if c.group in ("verbatim", "template")]

    def near(text: str) -> str:
        nearest = max(repeated, key=lambda other: overlap(text, other))
        return nearest if overlap(text, nearest) >= HALF else ""

    return [
        Caption(c.text, c.group, "" if c.text in repeated else near(c.text))
        for c in demo.captions()
    ]


@cache
def demo_images() -> Images:
    """Return the demo's thumbnails."""
    return Images(
        pixels=np.stack([np.array(image) for image in demo.training_images()]),
        caption_of=np.array([r.caption for r in build_renderings(list(demo.captions()))]),
        fresh=np.stack([np.array(image) for image in demo.control_images()]),
    )


def made(name: str) -> BenchModel:
    """Return one of the models that are made here."""
    folder = FOLDER / name
    return BenchModel(
        name, str(folder / "model"), folder / "model",
        cache(lambda: load_captions(folder / "captions.json")),
        cache(lambda: load_images(folder / "images.safetensors")),
    )  # fmt: skip


MODELS = {
    model.name: model
    for model in (
        BenchModel("demo", "demo", demo.MODEL, demo_captions, demo_images),
        BenchModel("demo-flow", "demo-flow", demo.FLOW, demo_captions, demo_images),
        *map(made, RECIPES),
    )
}
"""By name; `RECIPES` says how the last three are made."""


def chosen_models(names: Sequence[str] | None) -> list[BenchModel]:
    """Return the named models, or all five but those that are not made yet, which it prints."""
    if names:
        for name in names:
            MODELS[name].require()
        return [MODELS[name] for name in names]
    for name in (absent := [n for n, model in MODELS.items() if not model.folder.is_dir()]):
        print(f"{name} is not made yet and is left out: `make bench-models` makes it.")
    return [model for name, model in MODELS.items() if name not in absent]
