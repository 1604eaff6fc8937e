"""How well copies are recognised on models with known truth: ``make bench NAME=copies``.

Draws captions of each model, keeps the images in --work, and judges them by both rules of
`audit.common.copies` and by rivals, in pixels and in SSCD. Prints and records the figures, and
with --sheet writes ten pairs of each verdict. Other models: --models, see
`copies_cases.read_cases`.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from copies_cases import Asked, Case, Drawn, demo_case, draw, read_cases
from figures import Figure, command_of, record, share_of
from PIL import Image, ImageDraw
from unmemorize import demo
from unmemorize.audit.common.copies import OTHERS, Bounds, Judged, TrainingImages, judge
from unmemorize.audit.common.similarity import PIXELS, Features, sscd_features
from unmemorize.audit.common.sscd import has_sscd
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
    found: dict[str, Figure], key: str, calls: Sequence[bool], truth: Sequence[bool], draws: int = 1
) -> None:
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
    return [judged.limit is not None and v.ratio < judged.limit for v in judged.verdicts]


class Rows:
    """Features of a case's generations and training images."""

    def __init__(self, case: Case, drawn: Drawn, features: Features):
        self.case, self.drawn, self.features = case, drawn, features
        self.training = features.rows(case.images)
        # SSCD takes a thumbnail and the same image in full size for two.
        size = case.images[0].size
        self.generated = features.rows(
            [i.resize(size, Image.Resampling.BOX) if i.width > size[0] else i for i in drawn.images]
        )

    def judge(self, kept: Sequence[int], extra: torch.Tensor | None = None) -> Judged:
        """Judge all generations against some of the training images, and others that none means."""
        rows = self.training[list(kept)]
        captions = [self.case.captions[i] for i in kept]
        if extra is not None:
            rows = torch.cat([rows, extra])
            captions += [f"extra {i}" for i in range(len(extra))]
        return judge(
            self.generated, self.drawn.prompts, TrainingImages(rows, captions), self.features.bounds
        )


def measure_own(rows: Rows, key: str, found: dict[str, Figure]) -> None:
    """Print the rule of the own image: positives, and negatives that have images of their own."""
    has_own = set(rows.case.captions)
    judged = rows.judge(range(len(rows.training)))
    told = [i for i, prompt in enumerate(rows.drawn.prompts) if prompt in has_own]
    calls, truth = by_own(judged, rows.features.bounds), rows.drawn.copied
    note(found, key, [calls[i] for i in told], [truth[i] for i in told])


def measure_any(rows: Rows, size: int, key: str, found: dict[str, Figure]) -> None:
    """Print the rule of any image among `size`: positives' own images, then whatever there is.

    Below the number of positives' own images, several sets are drawn; a positive whose own image
    is not in the set is a negative there.
    """
    case, drawn = rows.case, rows.drawn
    positive = {p for p, copied in zip(drawn.prompts, drawn.copied, strict=True) if copied}
    first = [i for i, caption in enumerate(case.captions) if caption in positive]
    rest = [i for i, caption in enumerate(case.captions) if caption not in positive]
    generator = torch.Generator().manual_seed(size)

    def some(of: Sequence[int], count: int) -> list[int]:
        return [of[i] for i in torch.randperm(len(of), generator=generator)[:count].tolist()]

    calls, truth = [], []
    draws = DRAWS if size < len(first) else 1
    for _ in range(draws):
        kept = some(first, size)
        kept += some(rest, size - len(kept))
        extra = None
        if (missing := size - len(kept)) > 0:
            extra = others_like(rows, missing, generator)
        inside = {case.captions[i] for i in kept}
        calls += by_any(rows.judge(kept, extra))
        truth += [c and p in inside for c, p in zip(drawn.copied, drawn.prompts, strict=True)]
    note(found, f"{key}.{size}", calls, truth, draws)


def measure_few(rows: Rows, key: str, found: dict[str, Figure]) -> None:
    """Print the rule of the own image with as few other prompts as it accepts."""
    generator = torch.Generator().manual_seed(0)
    training, drawn = TrainingImages(rows.training, rows.case.captions), rows.drawn
    names = sorted({p for p in drawn.prompts if p in training.own})
    calls, truth = [], []
    for name in names:
        others = sorted({p for p in drawn.prompts if p != name})
        chosen = {others[i] for i in torch.randperm(len(others), generator=generator)[:OTHERS]}
        kept = [i for i, p in enumerate(drawn.prompts) if p == name or p in chosen]
        judged = judge(
            rows.generated[kept], [drawn.prompts[i] for i in kept], training, PIXELS.bounds
        )
        for place, call in zip(kept, by_own(judged, PIXELS.bounds), strict=True):
            if drawn.prompts[place] == name:
                calls.append(call)
                truth.append(drawn.copied[place])
    note(found, key, calls, truth)


def measure_renderings(rows: Rows, found: dict[str, Figure]) -> None:
    """Print how many renderings of the demo's drawings that were never trained on are copies."""
    images = demo.control_images()
    generated = PIXELS.rows(images)
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        more = others_like(rows, max(0, size - len(rows.training)), generator)
        pool = torch.cat([rows.training, more])
        pool = pool[torch.randperm(len(pool), generator=generator)[:size]]
        training = TrainingImages(pool, [f"image {i}" for i in range(size)])
        judged = judge(
            generated, [f"rendering {i}" for i in range(len(images))], training, PIXELS.bounds
        )
        key = f"grid.copies_any.{demo.NAME}.renderings.{size}"
        note(found, key, by_any(judged), [False] * len(images))


def measure_groups(case: Case, work: Path, found: dict[str, Figure]) -> None:
    """Keep what share of each group's images is a copy for an audit, template captions among them.

    Those are no truth for a rule: their layout comes back, what it holds varies.
    """
    group_of = {caption.text: caption.group for caption in demo.captions()}
    template = [Asked(text=t, copied=False) for t, g in group_of.items() if g == "template"]
    drawn = draw(replace(case, asked=(*case.asked, *template)), work)
    rows = Rows(case, drawn, PIXELS)
    calls: dict[str, list[bool]] = {}
    for prompt, verdict in zip(
        drawn.prompts, rows.judge(range(len(rows.training))).verdicts, strict=True
    ):
        calls.setdefault(group_of[prompt], []).append(bool(verdict.copied))
    found |= {f"grid.copies.{demo.NAME}.{g}.copied": share_of(hits) for g, hits in calls.items()}


def others_like(rows: Rows, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return training thumbnails turned upside down or with swapped colours, as further images."""
    images = rows.training.view(-1, 32, 32, 3)
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
    key, truth = f"rivals.copies.{name}.{features}", rows.drawn.copied
    training, generated = rows.training[:280], rows.generated
    note(found, f"{key}.ratio_leave_one_out", ratio_rule(training, generated), truth)
    note(found, f"{key}.clustered_first", ratio_rule(clustered(training), generated), truth)
    if features == "sscd":
        cosine = 1 - torch.cdist(generated, training).amin(1) ** 2 / 2
        note(found, f"{key}.fixed_half", (cosine > 0.5).tolist(), truth)


def draw_sheet(case: Case, drawn: Drawn, judged: Judged, path: Path) -> None:
    """Write pairs of training image and generation: ten copies, ten that are none."""
    called = [bool(v.copied) for v in judged.verdicts]
    sheet = Image.new("RGB", (PAIRS * (TILE + GAP) + GAP, 4 * TILE + 5 * GAP + 2 * 18), "white")
    pen, top = ImageDraw.Draw(sheet), GAP
    for verdict, title in ((True, "a copy"), (False, "not a copy")):
        pen.text((GAP, top), f"{title}: training image above, generation below", fill="black")
        picks = spread([i for i, call in enumerate(called) if call is verdict], judged)
        for column, place in enumerate(picks):
            nearest = judged.verdicts[place].index
            full = demo.training_image(case.captions[nearest]) if case.name == demo.NAME else None
            training = full or case.images[nearest]
            for row, image in enumerate((training, drawn.images[place])):
                corner = GAP + column * (TILE + GAP), top + 18 + row * TILE
                sheet.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), corner)
        top += 2 * TILE + 18 + 2 * GAP
    sheet.quantize(256).save(path, optimize=True)


def spread(places: list[int], judged: Judged) -> list[int]:
    """Return ten places, the clearest and the least clear among them."""
    places = sorted(places, key=lambda i: judged.verdicts[i].ratio)
    step = max(1, (len(places) - 1) / (PAIRS - 1))
    return [places[round(k * step)] for k in range(min(PAIRS, len(places)))]


def measure(case: Case, drawn: Drawn, found: dict[str, Figure]) -> None:
    """Print all figures of one model."""
    kinds = {"pixels": PIXELS} | ({"sscd": sscd_features()} if has_sscd() else {})
    for name, features in kinds.items():
        rows = Rows(case, drawn, features)
        start = "" if name == "pixels" else "grid."
        end = "" if name == "pixels" else f".{name}"
        measure_own(rows, f"{start}copies.{case.name}{end}", found)
        for size in SIZES:
            if size <= len(rows.training) or name == "pixels":
                measure_any(rows, size, f"{start}copies_any.{case.name}{end}", found)
        measure_rivals(rows, case.name, name, found)
        if case.name == demo.NAME and name == "pixels":
            measure_renderings(rows, found)
            measure_few(rows, f"grid.copies.{case.name}.others_{OTHERS}", found)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, judge, print and record the figures, and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="table of further models, JSON")
    parser.add_argument("--verbatim", type=int, default=48, help="captions that are copied")
    parser.add_argument("--others", type=int, default=100, help="learnt, and as many held out")
    parser.add_argument("--work", type=Path, default=Path("build/bench-copies"))
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    parser.add_argument("--sheet", type=Path, help="PNG with pairs of the demo")
    args = parser.parse_args(argv)
    cases = [demo_case(args.verbatim, args.others)]
    cases += read_cases(args.models) if args.models else []
    for case in cases:
        found: dict[str, Figure] = {}
        drawn = draw(case, args.work)
        measure(case, drawn, found)
        if case.name == demo.NAME:
            measure_groups(case, args.work, found)
        record(found, command_of("copies", argv), output=args.output)
        if args.sheet and case is cases[0]:
            rows = Rows(case, drawn, PIXELS)
            draw_sheet(case, drawn, rows.judge(range(len(rows.training))), args.sheet)


if __name__ == "__main__":
    main()
