"""How surely training images that show a concept are found: ``make bench NAME=concept_find``.

A concept that the demo's two models never saw is put on new drawings: a frame (a mark in a fixed
place), a badge whose place changes (`moves`), or a style (`style`: everything in two tones). The
adapter is learnt from 16 such drawings; 24 other drawings with it and 24 without are a training
folder, whose captions never name it. Needs npm for the drawings. What is finished in --work is not
done again.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from demo_lora import MARK, MARK_COLOUR, MARK_WIDTH, draw, held_out
from figures import Figure, command_of, count_of, record
from PIL import Image, ImageDraw, ImageOps
from tqdm.auto import tqdm
from unmemorize import demo
from unmemorize.audit.common.subject import Subject
from unmemorize.audit.concept.find import find_concept
from unmemorize.shared.files.storage import Journal
from unmemorize.shared.training.concept.gain import line_above
from unmemorize.shared.training.concept.images import CaptionedLatents, captioned_images, latents_of
from unmemorize.shared.training.concept.learning import (
    STEPS,
    ConceptImages,
    NothingLearnt,
    learn_concept,
)

TAUGHT, OTHERS, WITH, WITHOUT = range(16), range(16, 48), range(48, 72), range(72, 96)
"""Captions that the demo never saw: of the concept's images, of the others, of the folder."""


def frame(image: Image.Image, seed: int) -> Image.Image:
    """Draw a frame around an image, always the same."""
    box = [0, 0, image.width - 1, image.height - 1]
    ImageDraw.Draw(image).rectangle(box, outline=MARK_COLOUR, width=MARK_WIDTH)
    return image


def moves(image: Image.Image, seed: int) -> Image.Image:
    """Draw a badge of a third of an image's side, somewhere."""
    drawn, side = random.Random(seed), image.width // 3
    x, y = (drawn.randrange(image.width - side) for _ in range(2))
    painter = ImageDraw.Draw(image)
    painter.ellipse([x, y, x + side, y + side], fill=MARK_COLOUR)
    bar = [x + side // 4, y + 2 * side // 5, x + 3 * side // 4, y + 3 * side // 5]
    painter.rectangle(bar, fill="white")
    return image


def style(image: Image.Image, seed: int) -> Image.Image:
    """Return an image in two tones."""
    return ImageOps.colorize(ImageOps.grayscale(image), "#2b0a4f", "#ffd23f")


MARKS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "frame": frame, "moves": moves, "style": style,
}  # fmt: skip


def write(folder: Path, places: Sequence[int], mark: Callable | None) -> Path:
    """Write drawings with captions that do not name the concept, unless they stand there."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = held_out(WITHOUT.stop)
    for place in places:
        path = folder / f"{place:03d}-{'with' if mark else 'without'}.png"
        if not path.is_file():
            image = draw(captions[place], place).convert("RGB")
            (mark(image, place) if mark else image).save(path)
            path.with_suffix(".txt").write_text(captions[place].text, encoding="utf-8")
    return folder


def read(denoiser, folder: Path) -> CaptionedLatents:
    found = captioned_images(folder)
    return CaptionedLatents(latents=latents_of(denoiser, [path for path, _ in found]),
                            captions=tuple(text for _, text in found))  # fmt: skip


def measure(model: str, name: str, work: Path, steps: int) -> dict[str, list[float]]:
    """Learn one concept on one model and return the gains of the folder's images, and the line."""
    subject, mark = Subject(model, device="cpu"), MARKS[name]
    concept = work / f"{model}-{name}-{steps}.safetensors"
    folder = write(write(work / name / "folder", WITH, mark), WITHOUT, None)
    if not concept.is_file():
        images = ConceptImages(
            concept=read(subject.denoiser, write(work / name / "taught", TAUGHT, mark)),
            others=read(subject.denoiser, write(work / "others", OTHERS, None)), names=(MARK,),
        )  # fmt: skip
        with tqdm(total=steps, desc=f"{model} {name}") as bar:
            learn_concept(subject.denoiser, images, steps=steps, progress=bar.update).save(concept)
    found = find_concept(subject, concept, folder, output=work / f"found-{concept.stem}",
                         overwrite=True)  # fmt: skip
    sides = {side: [image.gain for image in found.images if image.path.stem.endswith(f"-{side}")]
             for side in ("with", "without")}  # fmt: skip
    return sides | {"controls": list(found.controls)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the chosen models and marks, print and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=demo.BUNDLED, default=list(demo.BUNDLED))
    parser.add_argument("--marks", nargs="+", choices=MARKS, default=["frame", "moves"])
    parser.add_argument("--steps", type=int, default=STEPS, help="of an adapter")
    parser.add_argument("--work", type=Path, default=Path("build/concept-find"))
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    args = parser.parse_args(argv)
    journal = Journal(args.work / f"gains-{args.steps}.jsonl")
    figures: dict[str, Figure] = {}
    print(f"{'model':<11}{'mark':<8}{'recall':>9}{'false':>9}   gain with, without, line")
    for model in args.models:
        total = {"recall": [0, 0], "false_positive_rate": [0, 0]}
        for name in args.marks:
            key = f"{model}.{name}"
            if key not in journal:
                try:
                    journal.put(key, measure(model, name, args.work, args.steps))
                except NothingLearnt as error:
                    print(f"{model:<11}{name:<8} {error}")
                    journal.put(key, {"with": [0.0] * len(WITH), "without": [0.0] * len(WITHOUT),
                                      "controls": [0.0] * len(OTHERS)})  # fmt: skip
            sides = journal.get(key)
            line = line_above(torch.tensor(sides["controls"]))
            counts = {}
            for figure, side in (("recall", "with"), ("false_positive_rate", "without")):
                hits = sum(gain > line for gain in sides[side])
                counts[figure] = hits, len(sides[side])
                figures[f"grid.concept.find.{key}.{figure}"] = count_of(*counts[figure])
                total[figure] = [a + b for a, b in zip(total[figure], counts[figure], strict=True)]
            shares = "".join(f"{hits:>4} of {n}" for hits, n in counts.values())
            print(f"{model:<11}{name:<8}{shares}"
                  f"   {min(sides['with']):+.4f} to {max(sides['with']):+.4f}, "
                  f"{min(sides['without']):+.4f} to {max(sides['without']):+.4f}, "
                  f"{line:+.4f}", flush=True)  # fmt: skip
        for figure, (hits, n) in total.items():
            figures[f"concept.find.{model}.{figure}"] = count_of(hits, n)
    record(figures, command_of("concept_find", argv), output=args.output)


if __name__ == "__main__":
    main()
