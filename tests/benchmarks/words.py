"""How well each method names the words that bring images back: ``make bench NAME=words``.

Behaviour is what removing a word does to the image: its distance to the caption's own training
image rises, or not. Every caption is drawn as it is and without each of its words, from one seed;
images stand in --work, and a run that was stopped goes on. Prints per method the rank correlation
with behaviour (Spearman, mean over captions), how often its first word is the one that matters
most, and the share of copies left after that word is dropped, by the audit's own rule.
"""

import argparse
import hashlib
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from figures import Figure, command_of, mean_of, plain, record, share_of
from scipy.stats import spearmanr
from tqdm.auto import tqdm
from unmemorize import demo
from unmemorize.audit.common.measure import silent
from unmemorize.audit.common.similarity import PIXELS
from unmemorize.audit.model.comparison import Comparer, Known, known_images
from unmemorize.audit.model.inputs import read_named
from unmemorize.shared.files.images import read_image, save_png
from unmemorize.shared.models.load import load_denoiser, model_fingerprint
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.words.explanation import explain
from unmemorize.shared.words.leaving_out import without_word

STEPS, COND_SCALE, SEED = 20, 7.5, 0
"""Of the images."""
LEAST = 3
"""Words of a caption, at least: two words have no rank correlation worth the name."""


class Model(NamedTuple):
    """A model with known truth."""

    name: str
    """In the keys."""
    folder: Path
    """As diffusers reads it."""
    captions: Callable[[], list[str]]
    """Captions whose image was repeated in training."""
    images: Callable[[], Known | None]
    """All training images with their captions."""


def beside(folder: Path) -> Callable[[], Known | None]:
    """Return the images of a training folder, each with its caption in a text file beside it."""
    return lambda: known_images("", read_named([folder], (), is_demo=False), silent)


def repeated_in_the_demo() -> list[str]:
    """Return the demo's verbatim captions."""
    return [c.text for c in demo.captions() if c.group == "verbatim"]


MODELS = (
    Model(
        "demo", demo.MODEL, repeated_in_the_demo,
        lambda: known_images(demo.NAME, read_named((), (), is_demo=True), silent),
    ),
)  # fmt: skip
"""Add a line a model: name, folder, captions, images (`beside(Path("build/models/u/images"))`)."""

METHODS = {
    "leave_out": ("leave_out", 1),  # the shipped default
    "leave_out_4_seeds": ("leave_out", 4),
    "input_gradient": ("input_gradient", 1),
    "encoder_gradient": ("encoder_gradient", 1),
    "encoder_gradient_4_seeds": ("encoder_gradient", 4),
}
"""Method of `explain` and number of seeds, by name."""


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What became of one caption's image without each of its words."""

    caption: str
    words: list[str]
    rises: list[float]
    """Per word, how much farther the image is from the caption's own one (RMS of pixels)."""
    copy: bool
    """The caption's image is a copy of its own training image."""
    copies: list[bool]
    """Per word, whether it still is without the word."""


def observed(denoiser, model: Model, captions: Sequence[str], work: Path) -> list[Behaviour]:
    """Return the behaviour of each caption; images that are there are not drawn again."""
    known = model.images()
    if known is None:
        raise ValueError(f"{model.name}: no training images are known.")
    folder = work / model_fingerprint(model.folder)[:12]
    paths: dict[str, list[str]] = {}
    for caption in tqdm(captions, f"{model.name}: images"):
        words = caption.split()
        texts = [caption, *(without_word(caption, words, i) for i in range(len(words)))]
        paths[caption] = [f"{hashlib.sha256(t.encode()).hexdigest()[:24]}.png" for t in texts]
        for text, path in zip(texts, paths[caption], strict=True):
            if not (folder / path).is_file():
                image = denoiser.generate([text], [SEED], steps=STEPS, cond_scale=COND_SCALE)[0]
                save_png(image, folder / path)
    # The captions are each other's yardstick: what others' images reach is no copy.
    pairs = [(caption, path) for caption, drawn in paths.items() for path in dict.fromkeys(drawn)]
    judged = Comparer(known, folder, features=PIXELS).judge(pairs)
    copied = {
        pair: bool(verdict.copied and verdict.is_own)
        for pair, verdict in zip(pairs, judged.verdicts, strict=True)
    }
    if any(verdict.copied is None for verdict in judged.verdicts):
        print(f"{model.name}: with so few captions nothing tells which images are copies.")
    return [
        Behaviour(
            caption=caption, words=caption.split(), rises=_rises(known, folder, caption, drawn),
            copy=copied[caption, drawn[0]], copies=[copied[caption, path] for path in drawn[1:]],
        )
        for caption, drawn in paths.items()
    ]  # fmt: skip


def _rises(known: Known, folder: Path, caption: str, drawn: Sequence[str]) -> list[float]:
    """Return how much farther from the caption's own image each of the others is than the first."""
    pairs = zip(known.captions, known.thumbnails, strict=True)
    own = PIXELS.rows([image for other, image in pairs if other == caption])
    rows = PIXELS.rows([read_image(folder / path) for path in drawn])
    distances = torch.cdist(rows, own).amin(1) / own.shape[1] ** 0.5
    return (distances[1:] - distances[0]).tolist()


def ranks(denoiser, name: str, caption: str) -> list[float]:
    """Return what a method says of each word of a caption; words it did not try come last."""
    if name == "random_word":
        draw = random.Random(caption)
        return [draw.random() for _ in caption.split()]
    method, seeds = METHODS[name]
    config = DetectionConfig(seeds=tuple(range(seeds)))
    occlude = None if method == "leave_out" else 0
    values = explain(denoiser, caption, config, method=method, occlude=occlude).significance
    return [-math.inf if math.isnan(value) else value for value in values]


def forwards(denoiser, name: str, caption: str) -> float:
    """Return the time of one explanation over that of one row through the network."""
    sigma, cond = denoiser.sigmas(50)[0], denoiser.encode([caption])
    x = denoiser.initial_noise([0], sigma)

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    with torch.inference_mode():
        row = min(seconds(lambda: denoiser.denoise(x, sigma, cond)) for _ in range(5))
    return min(seconds(lambda: ranks(denoiser, name, caption)) for _ in range(3)) / row


def correlation(values: Sequence[float], rises: Sequence[float]) -> float:
    """Return Spearman's rank correlation, 0 where all words are the same to the method."""
    if len(set(values)) == 1 or len(set(rises)) == 1:
        return 0.0
    return float(spearmanr(values, rises).statistic)


def measure(model: Model, number: int | None, work: Path) -> dict[str, Figure]:
    """Return the figures of one model by their keys, and print them."""
    denoiser = load_denoiser(model.folder)
    captions = [text for text in model.captions() if len(text.split()) >= LEAST][:number]
    seen = observed(denoiser, model, captions, work)
    before = share_of([one.copy for one in seen])
    found = {f"rivals.words.{model.name}.none.copies_left": before}
    print(f"\n{model.name}, {len(seen)} captions, {before.value:.2f} of them copied")
    print(f"{'method':<26}{'spearman':>10}{'95 % interval':>17}{'top1':>7}{'copies left':>13}"
          f"{'forwards':>10}")  # fmt: skip
    for name in (*METHODS, "random_word"):
        said = [ranks(denoiser, name, one.caption) for one in tqdm(seen, name, leave=False)]
        tops = [max(range(len(values)), key=values.__getitem__) for values in said]
        pairs = list(zip(seen, said, tops, strict=True))
        figures = {
            "spearman": mean_of([correlation(v, one.rises) for one, v, _ in pairs]),
            "top1": share_of([one.rises[top] == max(one.rises) for one, _, top in pairs]),
            "copies_left": share_of([one.copies[top] for one, _, top in pairs]),
        }
        prefix = (
            f"words.{model.name}" if name == "leave_out" else f"rivals.words.{model.name}.{name}"
        )
        found |= {f"{prefix}.{key}": value for key, value in figures.items()}
        cost = 0.0 if name == "random_word" else statistics.median(
            forwards(denoiser, name, one.caption) for one in seen[:3]
        )  # fmt: skip
        found[f"grid.words.{model.name}.{name}.forwards"] = plain(cost, min(3, len(seen)))
        rank = figures["spearman"]
        interval = "" if rank.low is None else f"{rank.low:.2f} to {rank.high:.2f}"
        print(f"{name:<26}{rank.value:>10.2f}{interval:>17}"
              f"{figures['top1'].value:>7.2f}{figures['copies_left'].value:>13.2f}"
              f"{cost:>10.1f}", flush=True)  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the chosen models, print tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [model.name for model in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--captions", type=int, help="of each model; default: all")
    parser.add_argument("--work", type=Path, default=Path("build/words"))
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    args = parser.parse_args(argv)
    for model in MODELS:
        if model.name in args.models:
            found = measure(model, args.captions, args.work)
            record(found, command_of("words", argv), output=args.output)


if __name__ == "__main__":
    main()
