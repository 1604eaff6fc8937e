"""See what a demo model memorized: ``python -m unmemorize.audit.model.demo_check``.

Draws every caption from four seeds, compares each image with all training images and prints, per
group, how many captions give one of them back.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from tqdm.auto import tqdm

from ...demo import BUNDLED, NAME, captions, controls, data, training_images
from ...shared.copies.features import PIXELS, thumbnails
from ...shared.copies.neighbours import TrainingImages
from ...shared.score.rates import clopper_pearson
from ..common.copies import Verdict, judge
from ..common.subject import Subject
from .images import PROMPTS

SEEDS = (0, 1, 2, 3)
STEPS = 30
COND_SCALE = 7.5


@dataclass(frozen=True, kw_only=True)
class CaptionCheck:
    """What the seeds of one caption gave."""

    caption: data.Caption
    images: tuple
    """PIL images, one a seed."""
    nearest: tuple[Verdict, ...]
    """Per seed, the nearest of all training images."""
    copies: int
    """Seeds that copy a training image of this caption; of a held-out one, any training image."""

    @property
    def reproduced(self) -> bool:
        """At least three seeds in four give a training image of this caption back."""
        return 4 * self.copies >= 3 * len(self.images)


class Judge:
    """Decides whether an image is a copy of a training image; pixels only, no weights."""

    def __init__(self, prompts: Sequence[str], images: Sequence):
        """Take generations of other captions, which tell what a copy is.

        Args:
            prompts: Of each image, at least `PROMPTS` different ones.
            images: PIL images, drawn as those that are judged.
        """
        texts = [captions()[r.caption].text for r in data.build_renderings(list(captions()))]
        self.training = TrainingImages(thumbnails(training_images()), texts)
        self.prompts, self.rows = tuple(prompts), thumbnails(images)

    def check(self, caption: data.Caption, images: Sequence) -> CaptionCheck:
        """Compare the images of one caption with the whole training set.

        A held-out caption has no image of its own: any copy counts against it.
        """
        rows = torch.cat([thumbnails(images), self.rows])
        prompts = [caption.text] * len(images) + list(self.prompts)
        nearest = judge(rows, prompts, self.training, PIXELS.bounds).verdicts[: len(images)]
        copies = sum(bool(v.copied) and (v.is_own or caption.group == "held_out") for v in nearest)
        return CaptionCheck(caption=caption, images=tuple(images), nearest=nearest, copies=copies)


def make_judge(denoiser) -> Judge:
    """Return a judge by the first seed of captions set aside as controls, drawn for it."""
    aside = controls()[:: len(controls()) // PROMPTS][:PROMPTS]
    return Judge(aside, denoiser.generate(aside, [SEEDS[0]] * PROMPTS, STEPS, COND_SCALE))


def choose(group: data.Group, limit: int | None) -> list[data.Caption]:
    """Return the first `limit` captions of a group; they stand in random order."""
    return [c for c in captions() if c.group == group][:limit]


def check(
    denoiser, chosen: Sequence[data.Caption], by: Judge, seeds: Sequence[int] = SEEDS
) -> list[CaptionCheck]:
    """Draw and judge captions; 30 DDIM steps at guidance 7.5.

    Args:
        denoiser: A `PipelineDenoiser` of a demo model.
        chosen: Captions to draw.
        by: Made for this model, see `make_judge`.
        seeds: One image of each caption per seed.
    """
    results = []
    for caption in tqdm(chosen, "captions"):
        images = denoiser.generate([caption.text] * len(seeds), list(seeds), STEPS, COND_SCALE)
        results.append(by.check(caption, images))
    return results


def contact_sheet(results: Sequence[CaptionCheck], path: Path, columns: int = 4) -> None:
    """Write captions with their images to one image, `columns` captions a row."""
    from PIL import Image, ImageDraw

    side, seeds = data.RESOLUTION // 2, len(results[0].images)
    width, height = side * seeds + 8, side + 18
    rows = -(-len(results) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, result in enumerate(results):
        x, y = index % columns * width, index // columns * height
        draw.text((x + 2, y + 2), result.caption.text[:40], fill="black")
        for k, image in enumerate(result.images):
            sheet.paste(image.resize((side, side)), (x + k * side, y + 16))
    sheet.save(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and write contact sheets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default=NAME, help=f"{' or '.join(BUNDLED)}, or a diffusers folder like theirs"
    )
    parser.add_argument("--limit", type=int, help="captions per group (default: all)")
    parser.add_argument("--sheets", type=Path, help="folder for one contact sheet per group")
    args = parser.parse_args(argv)
    denoiser = Subject(args.model).denoiser
    by = make_judge(denoiser)
    typer.echo(
        f"{'group':<10}{'captions':>9}{'reproduced':>12}{'95 % interval':>20}{'copies/image':>14}"
    )
    for group in data.GROUPS:
        results = check(denoiser, choose(group, args.limit), by)
        hits, count = sum(r.reproduced for r in results), len(results)
        low, high = clopper_pearson(hits, count)
        copies = sum(r.copies for r in results) / (count * len(SEEDS))
        interval = f"{low:.3f} to {high:.3f}"
        typer.echo(f"{group:<10}{count:>9}{hits / count:>12.3f}{interval:>20}{copies:>14.3f}")
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            contact_sheet(results[:48], args.sheets / f"{group}.webp")


if __name__ == "__main__":
    main()
