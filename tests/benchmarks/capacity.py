"""How many images a LoRA gives back at most: ``make bench NAME=capacity``.

LoRAs of the demo model are trained on sets of growing size, with one caption for all images, one
each or several each, at some ranks; every image is visited equally often. A generation is a copy
where its nearest training image lies within a third of the distance of the second nearest (Gu et
al., "On Memorization in Diffusion Models", arXiv:2310.02664), and a LoRA's capacity is
the largest set of which 90 % of the generations are copies. Each arm grows until it falls below.
What is finished in --work is not done again; only arms that came to their end are recorded. Needs
npm for new drawings.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from demo_lora import (
    BATCH,
    Pictures,
    add_lora,
    annealed,
    decoded,
    draw,
    encoded,
    held_out,
    rows_of,
    train,
)
from figures import command_of, plain, record
from tqdm.auto import tqdm
from unmemorize import demo
from unmemorize.shared.copies.features import thumbnails
from unmemorize.shared.files.storage import Journal
from unmemorize.shared.models.load import load_denoiser

CAPTIONS = ("one", "each", "several")
SIZES, RANKS = (2, 4, 8, 16, 32, 64), (4, 16, 64)
TRIGGER = "zorp"
WORDINGS = ("{}", "a drawing of {}", "{}, zorp", "zorp, {}")
"""Of the arm with several captions for each image."""
COPY = 1 / 3
"""Distance to the nearest image over that to the second nearest, below which it is a copy."""
BACK = 0.9
"""Share of the generations that are copies, from which on a set counts as given back."""
GENERATIONS = 32


def capacity(shares: Mapping[int, float], sizes: Sequence[int]) -> int | None:
    """Return the largest set that is given back, 0 for none, None where that is not known yet.

    Args:
        shares: By size, the share of generations that are copies, as far as it was measured.
        sizes: All, rising.
    """
    largest = 0
    for size in sizes:
        if size not in shares:
            return None
        if shares[size] < BACK:
            return largest
        largest = size
    return largest


def wordings(captions: str, text: str) -> tuple[str, ...]:
    """Return the captions of an image that shows what `text` says."""
    if captions == "one":
        return (TRIGGER,)
    return (text,) if captions == "each" else tuple(each.format(text) for each in WORDINGS)


def pictures_of(denoiser, captions: str, size: int) -> Pictures:
    """Return a set; an image with several captions is in it once with each."""
    drawings = [(draw(each, place), each.text) for place, each in enumerate(held_out(size))]
    single = encoded(denoiser, drawings)
    texts = [wordings(captions, text) for _, text in drawings]
    rows = [place for place, each in enumerate(texts) for _ in each]
    made = rows_of(single, rows)
    return Pictures(
        latents=made.latents, files=made.files, captions=tuple(t for each in texts for t in each)
    )


def copied(generations: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return which generations are copies, both [image number] of pixels."""
    near = torch.cdist(generations, images).topk(2, largest=False).values
    return near[:, 0] < COPY * near[:, 1]


def share_copied(denoiser, captions: str, size: int, rank: int, visits: int) -> float:
    """Train a LoRA on a set and return the share of its generations that are copies."""
    pictures = pictures_of(denoiser, captions, size)
    steps = max(1, visits * size // BATCH)
    add_lora(denoiser, 0, rank)
    done = train(denoiser, pictures, steps=steps, seed=0)
    for number, (optimizer, _) in enumerate(tqdm(done, f"{captions} {rank} {size}", steps)):
        annealed(optimizer, number, steps)
    asked = [pictures.captions[n % len(pictures.captions)] for n in range(GENERATIONS)]
    made = denoiser.generate(asked, list(range(GENERATIONS)), 20, 3.0)
    per_image = len(pictures.captions) // size
    images = decoded(denoiser, pictures.latents[::per_image])
    return copied(thumbnails(made), thumbnails(images)).double().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen arms, print and record the capacities."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", nargs="+", choices=CAPTIONS, default=CAPTIONS)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--visits", type=int, default=200, help="of each image")
    parser.add_argument("--work", type=Path, default=Path("build/capacity"))
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    args = parser.parse_args(argv)
    sizes = sorted(args.sizes)
    journal = Journal(args.work / f"capacity-{args.visits}.jsonl")
    denoiser, command = load_denoiser(demo.MODEL), command_of("capacity", argv)
    print(f"{'captions':<10}{'rank':>5}" + "".join(f"{size:>7}" for size in sizes) + "  capacity")
    for captions in args.captions:
        for rank in args.ranks:
            shares: dict[int, float] = {}
            for size in sizes:
                key = f"{captions}.{rank}.{size}"
                if key not in journal:
                    journal.put(key, share_copied(denoiser, captions, size, rank, args.visits))
                shares[size] = journal.get(key)
                if capacity(shares, sizes) is not None:
                    break
            largest = capacity(shares, sizes)
            cells = (f"{shares[size]:>7.2f}" if size in shares else f"{'':>7}" for size in sizes)
            print(f"{captions:<10}{rank:>5}" + "".join(cells) + f"  {largest}")
            figure = plain(float(largest), GENERATIONS)
            record({f"trainers.capacity.{captions}.{rank}": figure}, command, output=args.output)


if __name__ == "__main__":
    main()
