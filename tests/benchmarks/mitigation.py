"""What each way of mitigating buys and costs: ``make bench NAME=mitigation``.

    ARGS="--models demo drawings"    some of the five; without, all that are made

Draws planted captions of each model, and for the demo's two template captions, through the
calibrated gate as it ships, and learnt ones that it should leave alone. Pictures are kept in --work
(killed anywhere, it continues) and judged afterwards: copies of *any* training image, fidelity to
the caption, distance to real drawings, blank ones, time. Prompts of `scenes` and `scenes-flow` and
template captions name two objects, the others one. The demo's two need npm for other vendors'
drawings.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from bench_models import MODELS, chosen_models
from figures import Figure, command_of, plain, record
from mitigation_pictures import NONE, SEEDS, WAYS, Critic, Studio
from scores.case import WORK, Case
from tqdm.auto import tqdm
from unmemorize import demo
from unmemorize.shared.mitigation import DEFAULT
from unmemorize.shared.mitigation.embedding import EmbeddingOptimisation
from unmemorize.shared.mitigation.method import Start

USUAL = (NONE, DEFAULT, "ordinary", "embedding", "neighbour")
"""Ways that are compared where none are named."""
OTHERS = 24
"""Other prompts whose unmitigated images tell what a copy and what a blank image is."""


def measure(case: Case, args: argparse.Namespace) -> Iterator[dict[str, Figure]]:
    """Draw and judge one model's captions in every way; yield the figures of each group of them."""
    studio, groups = Studio(case, args.work), case.groups
    chosen = random.Random(0)
    asked = {
        "verbatim": groups.of(groups.planted), "template": groups.of(groups.template),
        "learnt": groups.of(groups.negatives),
    }  # fmt: skip
    asked = {name: chosen.sample(texts, min(args.captions, len(texts)))
             for name, texts in asked.items() if texts}  # fmt: skip
    more = [text for text in groups.of(groups.negatives) if text not in asked["learnt"]]
    others = [studio.draw(NONE, text, SEEDS[:1]) for text in tqdm(more[:OTHERS], "other prompts")]
    critic = Critic(case, others, args.art)
    start = f"mitigation.{case.model.name}"
    yield {f"{start}.others.quality": plain(critic.quality(others), len(others))}
    columns = ("reproduced", "fidelity", "quality", "blank", "time_ratio", "acted")
    print(f"\n{case.model.name:<20}{'':<10}" + "".join(f"{name:>12}" for name in columns))
    for group, texts in asked.items():
        usual = [studio.draw(NONE, text) for text in tqdm(texts, f"{group}: {NONE}", leave=False)]
        found = {}
        for way in args.ways if group != "learnt" else (NONE, DEFAULT):
            bar = tqdm(texts, f"{group}: {way}", leave=False)
            line = critic.figures([studio.draw(way, text) for text in bar], usual)
            for name in (way, "default") if way == DEFAULT else (way,):
                found |= {f"{start}.{name}.{group}.{what}": f for what, f in line.items()}
            cells = "".join(f"{line[name].value:>12.3f}" for name in columns)
            print(f"{way:<20}{group:<10}{cells}", flush=True)
        yield found


def measure_embedding(denoiser, found: dict[str, Figure]) -> None:
    """Print how much faster an iteration is than one that back-propagates through both rows."""
    sigma, images = denoiser.sigmas(50)[0], 16
    x, cond = denoiser.initial_noise(range(images), sigma), denoiser.encode(["owl"])[[0] * images]
    empty, network = denoiser.unconditional()[[0] * images], denoiser.pipeline.unet
    with torch.no_grad():
        x0_uncond = denoiser.denoise(x, sigma, empty)
    start = Start(
        denoiser=denoiser, cond=cond, x=x, sigma=sigma, x0_uncond=x0_uncond, network=network,
        generator=torch.Generator(),
    )  # fmt: skip

    def ours(iterations: int) -> None:
        EmbeddingOptimisation(target=0.0, iterations=iterations, batch_size=images).start(start)

    def both_rows(iterations: int) -> None:
        leaf = cond.embeddings.clone().requires_grad_()
        optimizer = torch.optim.AdamW([leaf], lr=0.05)
        both = torch.cat([x, x])
        for _ in range(iterations):
            rows = type(cond)(embeddings=torch.cat([empty.embeddings, leaf]))
            uncond, text = denoiser.denoise(both, sigma, rows).chunk(2)
            loss = ((uncond - text) / sigma).flatten(1).norm(dim=1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def seconds(work: Callable[[int], None], iterations: int) -> float:
        start = time.perf_counter()
        work(iterations)
        return time.perf_counter() - start

    ratios = []
    for _ in range(6):  # the difference of two lengths leaves out what happens once
        times = [seconds(work, 6) - seconds(work, 2) for work in (both_rows, ours)]
        ratios.append(times[0] / times[1])
    found["mitigation.embedding_speedup"] = plain(statistics.median(ratios[1:]), len(ratios) - 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, judge, print and record the figures of the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=USUAL)
    parser.add_argument("--captions", type=int, default=24, help="of each group, at most")
    parser.add_argument("--speed", action="store_true", help="time a step of `embedding` instead")
    parser.add_argument("--work", type=Path, default=Path("build/bench-mitigation"))
    parser.add_argument("--art", type=Path, default=Path("build/demo/art"))
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    args = parser.parse_args(argv)
    command = command_of("mitigation", argv)
    if args.speed:
        found: dict[str, Figure] = {}
        measure_embedding(Case.of(MODELS[demo.NAME], WORK).subject.denoiser, found)
        record(found, command, output=args.output)
        return
    for model in chosen_models(args.models):
        for found in measure(Case.of(model, WORK), args):
            record(found, command, output=args.output)


if __name__ == "__main__":
    main()
