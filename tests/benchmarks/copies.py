"""How well copies are recognised on models with known truth: ``make bench NAME=copies``.

    ARGS="--models demo scenes"    some of the five; without, all that are made

Draws captions of each model, keeps the images in --work, and judges them by both rules of
`audit.common.copies` and by rivals, in pixels and, where it is installed, in SSCD. Which images are
copies is decided apart from the rules, see `copies_truth`. Prints and records the figures, and
with --sheet writes ten pairs of each verdict, of the demo.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_models import MODELS, chosen_models
from bench_models.truth import SIDE
from copies_truth import Generations, ask, generations_of
from figures import Figure, command_of, record, share_of
from PIL import Image, ImageDraw
from scores.case import WORK, Case
from scores.generations import SEEDS, training_of
from unmemorize import demo
from unmemorize.audit.common.copies import OTHERS, Judged, judge
from unmemorize.audit.common.similarity import sscd_features
from unmemorize.audit.common.sscd import has_sscd
from unmemorize.shared.copies.features import PIXELS, Features
from unmemorize.shared.copies.neighbours import IMAGES, Bounds, TrainingImages
from unmemorize.shared.score.rates import clopper_pearson

SIZES = (10, 100, 280, 1000, 10000)
"""Numbers of training images that a generation is compared with."""
DRAWS = 10
"""Sets of training images that are drawn for each number below that of the positives' own."""
TILE, PAIRS, GAP = 96, 10, 6


def share(hits: Sequence[bool], draws: int) -> Figure:
    """Return a share with its Clopper-Pearson interval: the same image in ten sets is one image."""
    distinct = len(hits) // draws
    low, high = clopper_pearson(min(distinct, math.ceil(sum(hits) / draws)), distinct)
    return Figure(sum(hits) / len(hits), low, high, distinct)


def note(
    found: dict[str, Figure], key: str, calls: Sequence[bool], truth: Sequence[bool | None],
    draws: int = 1,
) -> None:  # fmt: skip
    """Print and keep recall and false-positive rate of calls; a side without images has none."""
    cells = ""
    for name, side in (("recall", True), ("false_positive_rate", False)):
        hits = [call for call, copied in zip(calls, truth, strict=True) if copied is side]
        if hits:
            found[f"{key}.{name}"] = f = share(hits, draws)
            cells += f"{f.value:>9.3f} [{f.low:.3f}, {f.high:.3f}] of {f.n:<5}"
        else:
            cells += f"{'-':>9}"
    print(f"{key:<52}{cells}", flush=True)


def by_own(judged: Judged, bounds: Bounds) -> list[bool]:
    """Return which generations copy their caption's own image."""
    return [v.is_own and v.own_ratio is not None and v.own_ratio < bounds.own_factor
            for v in judged.verdicts]  # fmt: skip


def by_any(judged: Judged) -> list[bool]:
    """Return which generations copy any image."""
    if judged.limit is None:
        raise ValueError(
            f"{len(judged.verdicts)} generations were judged without a limit for a copy of any "
            f"image: it takes {OTHERS} other prompts and {IMAGES} training images that differ."
        )
    return [v.ratio < judged.limit for v in judged.verdicts]


class Rows:
    """Features of generations and of their model's training images."""

    def __init__(self, case: Case, generations: Generations, features: Features):
        self.prompts, self.copied = generations.prompts, generations.copied
        self.features, self.training = features, training_of(case.model, features)
        # SSCD takes a thumbnail and the same image in full size for two.
        small = [i.resize((SIDE, SIDE), Image.Resampling.BOX) for i in generations.images]
        self.generated = features.rows(small)

    def judge(self, training: TrainingImages | None = None) -> Judged:
        """Judge all generations, against all training images or others."""
        training = training or self.training
        return judge(self.generated, self.prompts, training, self.features.bounds)


def measure_own(rows: Rows, key: str, found: dict[str, Figure]) -> None:
    """Print the rule of the own image: positives, and negatives that have images of their own."""
    told = [i for i, prompt in enumerate(rows.prompts) if prompt in rows.training.own]
    calls = by_own(rows.judge(), rows.features.bounds)
    note(found, key, [calls[i] for i in told], [rows.copied[i] for i in told])


def measure_any(rows: Rows, size: int, key: str, found: dict[str, Figure]) -> None:
    """Print the rule of any image among `size`: positives' own images, then whatever there is.

    Below the number of positives' own images, several sets are drawn; a positive whose own image
    is not in the set is a negative there.
    """
    captions = rows.training.captions
    positive = {p for p, copied in zip(rows.prompts, rows.copied, strict=True) if copied}
    first = [i for i, caption in enumerate(captions) if caption in positive]
    rest = [i for i, caption in enumerate(captions) if caption not in positive]
    generator = torch.Generator().manual_seed(size)

    def some(of: Sequence[int], count: int) -> list[int]:
        return [of[i] for i in torch.randperm(len(of), generator=generator)[:count].tolist()]

    calls, truth = [], []
    draws = DRAWS if size < len(first) else 1
    for _ in range(draws):
        kept = some(first, size)
        kept += some(rest, size - len(kept))
        extra = others_like(rows, size - len(kept), generator)
        names = [captions[i] for i in kept] + [f"extra {i}" for i in range(len(extra))]
        training = TrainingImages(torch.cat([rows.training.rows[kept], extra]), names)
        calls += by_any(rows.judge(training))
        truth += [c and p in training.own for c, p in zip(rows.copied, rows.prompts, strict=True)]
    note(found, f"{key}.{size}", calls, truth, draws)


def measure_few(rows: Rows, key: str, found: dict[str, Figure]) -> None:
    """Print the rule of the own image with as few other prompts as it accepts."""
    generator = torch.Generator().manual_seed(0)
    calls, truth = [], []
    for name in sorted({p for p in rows.prompts if p in rows.training.own}):
        others = sorted({p for p in rows.prompts if p != name})
        chosen = {others[i] for i in torch.randperm(len(others), generator=generator)[:OTHERS]}
        kept = [i for i, p in enumerate(rows.prompts) if p == name or p in chosen]
        prompts = [rows.prompts[i] for i in kept]
        judged = judge(rows.generated[kept], prompts, rows.training, PIXELS.bounds)
        for place, call in zip(kept, by_own(judged, PIXELS.bounds), strict=True):
            if rows.prompts[place] == name:
                calls.append(call)
                truth.append(rows.copied[place])
    note(found, key, calls, truth)


def measure_renderings(case: Case, rows: Rows, found: dict[str, Figure]) -> None:
    """Print how many images like the training set's that were never trained on are copies."""
    images = [Image.fromarray(pixels) for pixels in case.model.images().fresh]
    generated = PIXELS.rows(images)
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        more = others_like(rows, size - len(rows.training.rows), generator)
        pool = torch.cat([rows.training.rows, more])
        pool = pool[torch.randperm(len(pool), generator=generator)[:size]]
        training = TrainingImages(pool, [f"image {i}" for i in range(size)])
        prompts = [f"rendering {i}" for i in range(len(images))]
        judged = judge(generated, prompts, training, PIXELS.bounds)
        key = f"grid.copies_any.{case.model.name}.renderings.{size}"
        note(found, key, by_any(judged), [False] * len(images))


def measure_groups(case: Case, generations: Generations, found: dict[str, Figure]) -> None:
    """Keep what share of each group's images is a copy for an audit, template captions among them.

    Those are no truth for a rule: their layout comes back, what it holds varies.
    """
    group_of = {caption.text: caption.group for caption in case.model.captions()}
    template = case.groups.of(case.groups.template)
    rows = Rows(case, generations + generations_of(case, template, SEEDS[:1], None), PIXELS)
    calls: dict[str, list[bool]] = {}
    for prompt, verdict in zip(rows.prompts, rows.judge().verdicts, strict=True):
        calls.setdefault(group_of[prompt], []).append(bool(verdict.copied))
    start = f"grid.copies.{case.model.name}"
    found |= {f"{start}.{group}.copied": share_of(hits) for group, hits in calls.items()}


def others_like(rows: Rows, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return training thumbnails turned upside down or with swapped colours, as further images."""
    if count <= 0:  # SSCD's rows are no thumbnails, and need none
        return rows.training.rows[:0]
    images = rows.training.rows.view(-1, SIDE, SIDE, 3)
    made = torch.cat([images.flip(1), images.flip(1, 2), images[..., [2, 0, 1]]]).flatten(1)
    return made[torch.randperm(len(made), generator=generator)[:count]]


def ratio_rule(rows: torch.Tensor, generated: torch.Tensor) -> list[bool]:
    """Carlini et al. 2023 with leave-one-out: d_1 over half the mean of the 50 nearest."""

    def ratios(distances: torch.Tensor) -> torch.Tensor:
        return distances[:, 0] / (0.5 * distances.mean(1)).clamp_min(1e-12)

    rows = torch.unique(rows, dim=0)
    count = min(51, len(rows))
    among = torch.cdist(rows, rows).topk(count, largest=False).values[:, 1:]
    rank = max(1, int(0.01 * (len(rows) + 1)))
    limit = ratios(among).sort().values[rank - 1]
    near = torch.cdist(generated, rows).topk(count - 1, largest=False).values
    return (ratios(near) < limit).tolist()


def clustered(rows: torch.Tensor) -> torch.Tensor:
    """Return one image of each group of near-duplicates: a quarter of the median apart or less."""
    near = torch.cdist(rows, rows)
    kept: list[int] = []
    for index, row in enumerate(near):
        if not kept or row[kept].min() > 0.25 * near.median():
            kept.append(index)
    return rows[kept]


def measure_rivals(rows: Rows, name: str, features: str, found: dict[str, Figure]) -> None:
    """Print what other rules make of the same generations and the positives' and others' images."""
    key, truth = f"rivals.copies.{name}.{features}", rows.copied
    training, generated = rows.training.rows[:280], rows.generated
    note(found, f"{key}.ratio_leave_one_out", ratio_rule(training, generated), truth)
    note(found, f"{key}.clustered_first", ratio_rule(clustered(training), generated), truth)
    if features == "sscd":
        cosine = 1 - torch.cdist(generated, training).amin(1) ** 2 / 2
        note(found, f"{key}.fixed_half", (cosine > 0.5).tolist(), truth)


def draw_sheet(case: Case, generations: Generations, path: Path) -> None:
    """Write pairs of training image and generation of the demo: ten copies, ten that are none."""
    rows = Rows(case, generations, PIXELS)
    judged, thumbnails = rows.judge(), case.model.images().pixels
    sheet = Image.new("RGB", (PAIRS * (TILE + GAP) + GAP, 4 * TILE + 5 * GAP + 2 * 18), "white")
    pen, top = ImageDraw.Draw(sheet), GAP
    for verdict, title in ((True, "a copy"), (False, "not a copy")):
        pen.text((GAP, top), f"{title}: training image above, generation below", fill="black")
        places = [i for i, v in enumerate(judged.verdicts) if bool(v.copied) is verdict]
        for column, place in enumerate(spread(places, judged)):
            nearest = judged.verdicts[place].index
            full = demo.training_image(rows.training.captions[nearest])
            training = full or Image.fromarray(thumbnails[nearest])
            for row, image in enumerate((training, generations.images[place])):
                corner = GAP + column * (TILE + GAP), top + 18 + row * TILE
                sheet.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), corner)
        top += 2 * TILE + 18 + 2 * GAP
    sheet.quantize(256).save(path, optimize=True)


def spread(places: list[int], judged: Judged) -> list[int]:
    """Return ten places, the clearest and the least clear among them."""
    places = sorted(places, key=lambda i: judged.verdicts[i].ratio)
    step = max(1, (len(places) - 1) / (PAIRS - 1))
    return [places[round(k * step)] for k in range(min(PAIRS, len(places)))]


def measure(case: Case, generations: Generations) -> dict[str, Figure]:
    """Return the figures of one model by their keys, and print them."""
    found: dict[str, Figure] = {}
    model = case.model.name
    kinds = {"pixels": PIXELS} | ({"sscd": sscd_features()} if has_sscd() else {})
    for name, features in kinds.items():
        rows = Rows(case, generations, features)
        start = "" if name == "pixels" else "grid."
        end = "" if name == "pixels" else f".{name}"
        measure_own(rows, f"{start}copies.{model}{end}", found)
        for size in SIZES:
            if size <= len(rows.training.rows) or name == "pixels":
                measure_any(rows, size, f"{start}copies_any.{model}{end}", found)
        measure_rivals(rows, model, name, found)
        if name == "pixels":
            measure_renderings(case, rows, found)
            measure_few(rows, f"grid.copies.{model}.others_{OTHERS}", found)
    measure_groups(case, generations, found)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, judge, print and record the figures of the chosen models, and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--verbatim", type=int, default=60, help="planted captions, at most")
    parser.add_argument("--others", type=int, default=100, help="learnt, and as many held out")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    parser.add_argument("--sheet", type=Path, help="PNG with pairs of the demo")
    args = parser.parse_args(argv)
    if args.sheet and demo.NAME not in (args.models or MODELS):
        parser.error(f"--sheet shows the demo: name {demo.NAME} among --models")
    for model in chosen_models(args.models):
        case = Case.of(model, args.work)
        generations, back = ask(case, args.verbatim, args.others)
        whole = [all(seeds) for seeds in back.values()]
        part = sum(any(seeds) for seeds in back.values()) - sum(whole)
        print(f"\n{model.name}: of {len(back)} planted captions {sum(whole)} come back from every "
              f"seed; left out are {part} that come back from some and "
              f"{len(whole) - sum(whole) - part} from none")  # fmt: skip
        found = {f"grid.copies.{model.name}.come_back": share_of(whole)}
        found |= measure(case, generations)
        record(found, command_of("copies", argv), output=args.output)
        if args.sheet and model.name == demo.NAME:
            draw_sheet(case, generations, args.sheet)


if __name__ == "__main__":
    main()
