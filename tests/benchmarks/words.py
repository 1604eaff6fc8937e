"""How well each method names the words that bring images back: ``make bench NAME=words``.

    ARGS="--models demo scenes"    some of the five; without, all that are made
    ARGS="--only falls advice"     some of the parts; without, all

Behaviour is what removing a word does to the image: its distance to the caption's own training
image rises, or not. Every planted caption is drawn as it is and without each of its words, from one
seed; images stand in --work, and a run that was stopped goes on. Prints per method the rank
correlation with behaviour (Spearman, mean over captions, and over those whose image is a copy), how
often its first word is the one that matters most, and the share of copies left after that word is
dropped, by the audit's own rule.

`falls` says how often the magnitude's fall without a word is a rise at another starting noise,
`advice` for how many flagged captions there is a wording at or below the threshold.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_models import MODELS, chosen_models
from figures import Figure, command_of, mean_of, plain, record, share_of
from scipy.stats import spearmanr
from scores.case import WORK, Case
from scores.generations import drawn, training_of
from tqdm.auto import tqdm
from unmemorize.audit.common.copies import OTHERS, judge
from unmemorize.shared.copies.features import PIXELS
from unmemorize.shared.files.images import read_image
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.words.explanation import explain
from unmemorize.shared.words.leaving_out import without_word
from words_falls import measure_advice, measure_falls

SEED = 0
"""Of the images."""
LEAST = 3
"""Words of a caption, at least: two words have no rank correlation worth the name."""

PARTS = ("ranks", "falls", "advice")

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
    rises: list[float]
    """Per word, how much farther the image is from the caption's own one (RMS of pixels)."""
    copy: bool | None
    """The caption's image is a copy of its own training image; None with too few captions."""
    copies: list[bool | None]
    """Per word, whether it still is without the word."""


def observed(case: Case, captions: Sequence[str]) -> list[Behaviour]:
    """Return the behaviour of each caption, from images that are drawn where they are missing."""
    training = training_of(case.model)
    texts = {
        caption: [caption, *(without_word(caption, words, i) for i in range(len(words)))]
        for caption in captions
        for words in (caption.split(),)
    }
    paths = drawn(case, [text for each in texts.values() for text in each], (SEED,))
    # The captions are each other's yardstick: what others' images reach is no copy.
    pairs = [(caption, text) for caption, each in texts.items() for text in dict.fromkeys(each)]
    rows = PIXELS.rows([read_image(paths[text, SEED]) for _, text in pairs])
    verdicts = judge(rows, [caption for caption, _ in pairs], training, PIXELS.bounds).verdicts
    distances, copied = {}, {}
    for pair, row, verdict in zip(pairs, rows, verdicts, strict=True):
        apart = torch.linalg.vector_norm(training.rows[training.own[pair[0]]] - row, dim=1)
        distances[pair] = apart.min().item() / len(row) ** 0.5
        copied[pair] = verdict.copied and verdict.is_own
    return [
        Behaviour(
            caption=caption,
            rises=[distances[caption, text] - distances[caption, caption] for text in rest],
            copy=copied[caption, caption], copies=[copied[caption, text] for text in rest],
        )
        for caption, (_, *rest) in texts.items()
    ]  # fmt: skip


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


def measure(case: Case, number: int | None) -> dict[str, Figure]:
    """Return the figures of one model by their keys, and print them."""
    model, denoiser = case.model.name, case.subject.denoiser
    planted = case.groups.of(case.groups.planted)
    seen = observed(case, [text for text in planted if len(text.split()) >= LEAST][:number])
    found = {}
    told = not any(copy is None for one in seen for copy in (one.copy, *one.copies))
    if told:
        found[f"rivals.words.{model}.none.copies_left"] = before = share_of([s.copy for s in seen])
    copies = f"{before.value:.2f} of them copied" if told else (
        f"too few to tell copies, which needs {OTHERS} others")  # fmt: skip
    print(f"\n{model}, {len(seen)} captions, {copies}")
    print(f"{'method':<26}{'spearman':>10}{'95 % interval':>17}{'top1':>7}{'copies left':>13}"
          f"{'forwards':>10}")  # fmt: skip
    for name in (*METHODS, "random_word"):
        said = [ranks(denoiser, name, one.caption) for one in tqdm(seen, name, leave=False)]
        tops = [max(range(len(values)), key=values.__getitem__) for values in said]
        agreed = [correlation(v, one.rises) for v, one in zip(said, seen, strict=True)]
        pairs = list(zip(seen, tops, strict=True))
        figures = {
            "spearman": mean_of(agreed),
            "top1": share_of([one.rises[top] == max(one.rises) for one, top in pairs]),
        }
        if told:
            figures["copies_left"] = share_of([one.copies[top] for one, top in pairs])
        prefix = f"words.{model}" if name == "leave_out" else f"rivals.words.{model}.{name}"
        found |= {f"{prefix}.{key}": value for key, value in figures.items()}
        if of_copies := [c for c, one in zip(agreed, seen, strict=True) if one.copy]:
            found[f"grid.words.{model}.{name}.of_copies.spearman"] = mean_of(of_copies)
        cost = 0.0 if name == "random_word" else statistics.median(
            forwards(denoiser, name, one.caption) for one in seen[:3]
        )  # fmt: skip
        found[f"grid.words.{model}.{name}.forwards"] = plain(cost, min(3, len(seen)))
        rank = figures["spearman"]
        interval = "" if rank.low is None else f"{rank.low:.2f} to {rank.high:.2f}"
        left = f"{figures['copies_left'].value:.2f}" if told else "-"
        print(f"{name:<26}{rank.value:>10.2f}{interval:>17}{figures['top1'].value:>7.2f}"
              f"{left:>13}{cost:>10.1f}", flush=True)  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the chosen models, print tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--captions", type=int, help="of each model; default: all")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    args = parser.parse_args(argv)
    for model in chosen_models(args.models):
        case, found = Case.of(model, args.work), {}
        planted = case.groups.of(case.groups.planted)
        if "ranks" in args.only:
            found |= measure(case, args.captions)
        if "falls" in args.only:
            found |= measure_falls(case, planted[: args.captions])
        if "advice" in args.only:
            found |= measure_advice(case, planted[: args.captions])
        record(found, command_of("words", argv), output=args.output)


if __name__ == "__main__":
    main()
