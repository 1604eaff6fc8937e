"""What models draw, kept on disk, and which planted captions come back by the audit's rule."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from bench_models import BenchModel
from PIL import Image
from tqdm.auto import tqdm
from unmemorize.audit.common.copies import OTHERS, judge
from unmemorize.shared.copies.features import PIXELS, Features
from unmemorize.shared.copies.neighbours import TrainingImages
from unmemorize.shared.files.images import read_image, save_png

from .case import Case

SEEDS = (0, 1)
STEPS, COND_SCALE = 30, 7.5
BATCH = 8


def drawn(
    case: Case, texts: Sequence[str], seeds: Sequence[int] = SEEDS
) -> dict[tuple[str, int], Path]:
    """Return the image of each caption and seed; what was drawn before is not drawn again."""
    folder = case.folder / "images"
    paths = {
        (text, seed): folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}-{seed}.png"
        for text in texts
        for seed in seeds
    }
    missing = [pair for pair, path in paths.items() if not path.is_file()]
    label = f"{case.model.name}: images"
    for start in tqdm(range(0, len(missing), BATCH), label, disable=not missing):
        part = missing[start : start + BATCH]
        prompts, own_seeds = zip(*part, strict=True)
        images = case.subject.denoiser.generate(prompts, own_seeds, STEPS, COND_SCALE)
        for pair, image in zip(part, images, strict=True):
            save_png(image, paths[pair])
    return paths


def training_of(model: BenchModel, features: Features = PIXELS) -> TrainingImages:
    """Return all training images of a model with their captions, as a rule of copies takes them."""
    images, captions = model.images(), model.captions()
    return TrainingImages(
        features.rows([Image.fromarray(pixels) for pixels in images.pixels]),
        [captions[i].text for i in images.caption_of],
    )


def reproduced(case: Case) -> list[int]:
    """Return which planted captions give a copy of their own image, from one seed or from both.

    The captions are each other's yardstick.
    """
    paths = drawn(case, case.groups.of(case.groups.planted))
    rows = PIXELS.rows([read_image(path) for path in paths.values()])
    training = training_of(case.model)
    verdicts = judge(rows, [text for text, _ in paths], training, PIXELS.bounds).verdicts
    if any(verdict.copied is None for verdict in verdicts):
        raise ValueError(
            f"{case.model.name} has {len(case.groups.planted)} planted captions: too few to tell "
            f"what a copy is, which needs {OTHERS} others."
        )
    copies = {text for (text, _), v in zip(paths, verdicts, strict=True) if v.copied and v.is_own}
    return [i for i in case.groups.planted if case.groups.texts[i] in copies]
