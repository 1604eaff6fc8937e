"""LoRAs of exactly known truth against the audit's verdicts, for ``make bench``'s `lora_audit`.

Per model, planted captions (their image comes back with the LoRA alone) and learnt ones (one of
twelve images is in the folder, and none is learnt by heart) are drawn once. Many folders are made
of them, as they go wrong: few images and many, one planted image among others, images that the base
model draws already, files edited and saved again, one caption for all. `recall` is of planted
images that come back for an eye, see `copies_truth`; `false_verbatim` of the other images;
`false_clean` of folders with such an image that are called clean.
"""

import io
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from bench_models import BenchModel
from bench_models.truth import SIDE
from copies_truth import least_correlation, patterns
from figures import Figure, share_of
from known_lora import split
from known_sets import Judge, Made, Trained, saved
from PIL import Image, ImageOps
from simulated_sets import KINDS, Simulated
from tqdm.auto import tqdm
from unmemorize import demo
from unmemorize.audit.common.subject import Subject
from unmemorize.audit.lora.attack import as_images
from unmemorize.shared.files.images import read_image, save_png

SEEDS, EMPTY, BATCH = 2, 8, 4
COND_SCALE = 5.0
DRAWS = 4
"""Folders of each kind."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of folder."""

    planted: int
    others: int
    base: int = 0
    """Planted images that the base model draws as well."""
    edited: bool = False
    """Each planted image is there again mirrored, cropped, and as a JPEG of quality 40."""
    shared: bool = False
    """All images have one caption, and so have all generations."""


FOLDERS = (
    Kind(planted=10, others=8), Kind(planted=10, others=8, base=2), Kind(planted=1, others=8),
    Kind(planted=3, others=8), Kind(planted=3, others=0, edited=True), Kind(planted=0, others=8),
    Kind(planted=5, others=5, shared=True), Kind(planted=1, others=8, shared=True),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What a model's two halves draw, and the images."""

    planted: tuple[Trained, ...]
    others: tuple[Trained, ...]
    made: tuple[Made, ...]

    def folder(self, kind: Kind, rng: random.Random) -> tuple[list[Trained], list[Made]]:
        """Return a folder of a kind, and what was drawn for it."""
        planted = rng.sample(self.planted, kind.planted)
        others = rng.sample(self.others, kind.others)
        drawn = {t.caption for t in planted[: kind.base]}
        planted = [replace(t, back=t.back and t.caption not in drawn) for t in planted]
        chosen = [*planted, *others]
        captions = {"", *(t.caption for t in chosen)}
        on = {(m.prompt, m.seed): m.path for m in self.made if m.lora}
        made = [replace(m, path=on[m.prompt, m.seed]) if m.prompt in drawn else m
                for m in self.made if m.prompt in captions]  # fmt: skip
        if kind.edited:
            chosen += [again for t in planted for again in edited(t)]
        if kind.shared:
            chosen = [replace(t, caption="zorp") for t in chosen]
            made = [replace(m, prompt=m.prompt and "zorp", seed=n) for n, m in enumerate(made)]
        return chosen, made


def edited(trained: Trained) -> list[Trained]:
    """Return an image as people save it again; whether such a file comes back is left open."""
    image = Image.open(trained.path).convert("RGB")
    width, height = image.size
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    again = {
        "mirrored": ImageOps.mirror(image),
        "cropped": image.crop((width // 20, height // 20, width - width // 20, height)),
        "jpeg": Image.open(file).convert("RGB"),
    }
    return [
        replace(trained, path=(path := saved(each, trained.path.with_stem(
            f"{trained.path.stem}-{name}"))), trip=path)
        for name, each in again.items()
    ]  # fmt: skip


def draw(model: BenchModel, work: Path, planted: int, others: int, steps: int) -> Pool:
    """Draw captions with both halves of a model, unless it was done."""
    known = split(model, work / "halves")
    denoiser = Subject(str(known.base), lora=known.lora, device="cpu").denoiser
    captions = model.captions()
    groups = {group: [c.text for c in captions if c.group == group][:count]
              for group, count in (("verbatim", planted), ("learnt", others))}  # fmt: skip
    asked = [(text, seed) for texts in groups.values() for text in texts for seed in range(SEEDS)]
    asked += [("", seed) for seed in range(EMPTY)]
    made = []
    for lora in (True, False):
        paths = [work / "made" / f"{number:04d}-{'on' if lora else 'off'}.png"
                 for number in range(len(asked))]  # fmt: skip
        for start in tqdm(range(0, len(asked), BATCH), f"{model.name}, {'on' if lora else 'off'}"):
            part = slice(start, start + BATCH)
            if not all(path.is_file() for path in paths[part]):
                prompts, seeds = zip(*asked[part], strict=True)
                with nullcontext() if lora else denoiser.lora_disabled():
                    images = denoiser.generate(prompts, seeds, steps=steps, cond_scale=COND_SCALE)
                for path, image in zip(paths[part], images, strict=True):
                    save_png(image, path)
        made += [Made(path=path, prompt=prompt, seed=seed, lora=lora)
                 for path, (prompt, seed) in zip(paths, asked, strict=True)]  # fmt: skip
    least = least_correlation(model)

    def back(text: str) -> bool:
        """Return whether a caption's image comes back for an eye, with the LoRA."""
        own = patterns(model.training_images(text))
        rows = patterns(np.stack([
            np.array(read_image(m.path).resize((SIDE, SIDE), Image.Resampling.BOX))
            for m in made if m.lora and m.prompt == text
        ]))  # fmt: skip
        return bool((rows @ own.T).max() > least)

    def trained(group: str, number: int, text: str) -> Trained:
        full = demo.training_image(text) if model.name in demo.BUNDLED else None
        image = full or Image.fromarray(model.training_images(text)[0])
        path = saved(image, work / "images" / f"{group}-{number:02d}.png")
        trip = path.with_name(f"trip-{path.name}")
        if not trip.is_file():
            saved(as_images(denoiser.decode(denoiser.encode_images([read_image(path)])))[0], trip)
        return Trained(path=path, trip=trip, caption=text, back=group == "verbatim" and back(text))

    sides = {group: tuple(trained(group, n, text) for n, text in enumerate(texts))
             for group, texts in groups.items()}  # fmt: skip
    return Pool(planted=sides["verbatim"], others=sides["learnt"], made=tuple(made))


def measure_known(
    models: Sequence[BenchModel], work: Path, figures: dict[str, Figure], *,
    planted: int, others: int, steps: int,
) -> None:  # fmt: skip
    """Note per model what of planted images is found, and what is wrongly named or called clean."""
    for model in models:
        pool = draw(model, work / model.name, planted, others, steps)
        judge, recall, false, clean = Judge(work / model.name), [], [], []
        for number, kind in enumerate(FOLDERS * DRAWS):
            chosen, made = pool.folder(kind, random.Random(number))
            said = judge.judge(chosen, made)
            sure = [place for place, t in enumerate(chosen) if not t.path.stem.endswith(
                ("-mirrored", "-cropped", "-jpeg"))]  # fmt: skip
            recall += [place in said.named for place in sure if chosen[place].back]
            names = {t.path for t in pool.others}
            false += [place in said.named for place in sure if chosen[place].path in names]
            if any(t.back for t in chosen):
                clean.append(said.clean)
            print(f"{model.name} {kind}: {said.headline.text}", flush=True)
        start = f"lora.{model.name}"
        figures |= {f"{start}.recall": share_of(recall), f"{start}.false_verbatim": share_of(false),
                    f"{start}.false_clean": share_of(clean)}  # fmt: skip
        for key in ("recall", "false_verbatim", "false_clean"):
            print(f"{start}.{key}: {figures[f'{start}.{key}']}", flush=True)


def measure_simulated(work: Path, figures: dict[str, Figure], runs: int) -> None:
    """Note the same of simulated folders of one subject in one pose, of 5 to 20 images."""
    judge, recall, false, clean = Judge(work / "simulated"), [], [], []
    for number in tqdm(range(runs), "simulated"):
        kind = Simulated(
            kind=tuple(KINDS)[number % 2], count=(5, 10, 20)[number % 3], seed=1000 + number,
            copies=(0, 1, 3)[number // 2 % 3], shared=number // 6 % 2 == 1,
        )  # fmt: skip
        trained, made = kind.write(work / "simulated" / f"{number:02d}")
        said = judge.judge(trained, made)
        recall += [place in said.named for place, t in enumerate(trained) if t.back]
        false += [place in said.named for place, t in enumerate(trained) if not t.back]
        if kind.copies:
            clean.append(said.clean)
    figures |= {"lora.simulated.recall": share_of(recall),
                "lora.simulated.false_verbatim": share_of(false),
                "lora.simulated.false_clean": share_of(clean)}  # fmt: skip
    for key, figure in figures.items():
        print(f"{key}: {figure}", flush=True)
