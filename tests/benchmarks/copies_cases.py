"""Models whose copies are known: their captions, training images, and generations kept on disk."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm
from unmemorize import demo
from unmemorize.demo import data
from unmemorize.shared.files.images import save_png
from unmemorize.shared.models.load import load_denoiser, model_fingerprint

STEPS, COND_SCALE = 30, 7.5
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A caption to draw, and whether its generations copy a training image for an eye to see."""

    text: str
    copied: bool
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with known truth."""

    name: str
    folder: Path
    asked: tuple[Asked, ...]
    images: Sequence[Image.Image]
    """Training images, those that are copied among them."""
    captions: tuple[str, ...]
    """Of the images."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Generations of a case."""

    prompts: list[str]
    copied: list[bool]
    images: list[Image.Image]


def demo_case(verbatim: int, others: int) -> Case:
    """Return the demo: two seeds of verbatim captions, one of learnt and of held-out ones."""
    captions = demo.captions()
    asked = []
    for group, count, seeds in (
        ("verbatim", verbatim, (0, 1)), ("learnt", others, (0,)), ("held_out", others, (0,)),
    ):  # fmt: skip
        chosen = [c for c in captions if c.group == group][:count]
        asked += [Asked(text=c.text, copied=group == "verbatim", seeds=seeds) for c in chosen]
    texts = [captions[r.caption].text for r in data.build_renderings(list(captions))]
    return Case(name=demo.NAME, folder=demo.MODEL, asked=tuple(asked),
                images=demo.training_images(), captions=tuple(texts))  # fmt: skip


def read_cases(table: Path) -> list[Case]:
    """Return the models of a table: a JSON list of {"name", "folder", "captions"}.

    `captions` is a file of JSON lines {"text", "copied", "image"}: `copied` says whether the
    model's generations of it are copies; `image`, a path relative to the file, may be null.
    """
    cases = []
    for row in json.loads(table.read_text("utf-8")):
        file = table.parent / row["captions"]
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        pairs = [(line["text"], Image.open(file.parent / line["image"]).convert("RGB"))
                 for line in lines if line["image"]]  # fmt: skip
        cases.append(Case(
            name=row["name"], folder=table.parent / row["folder"],
            asked=tuple(Asked(text=line["text"], copied=line["copied"]) for line in lines),
            images=[image for _, image in pairs], captions=tuple(text for text, _ in pairs),
        ))  # fmt: skip
    return cases


def draw(case: Case, work: Path) -> Drawn:
    """Return the generations of a case; those in the folder are not drawn again."""
    folder = work / f"{case.name}-{model_fingerprint(case.folder)[:12]}"
    pairs = [(asked, seed) for asked in case.asked for seed in asked.seeds]
    paths = [folder / f"{hashlib.sha256(a.text.encode()).hexdigest()[:16]}-{seed}.png"
             for a, seed in pairs]  # fmt: skip
    missing = [place for place, path in enumerate(paths) if not path.is_file()]
    denoiser = load_denoiser(case.folder) if missing else None
    for start in tqdm(range(0, len(missing), BATCH), f"{case.name}: images", disable=not missing):
        part = missing[start : start + BATCH]
        texts, seeds = zip(*[(pairs[i][0].text, pairs[i][1]) for i in part], strict=True)
        for place, image in zip(
            part, denoiser.generate(texts, seeds, STEPS, COND_SCALE), strict=True
        ):
            save_png(image, paths[place])
    return Drawn(
        prompts=[asked.text for asked, _ in pairs], copied=[asked.copied for asked, _ in pairs],
        images=[Image.open(path).convert("RGB") for path in paths],
    )  # fmt: skip
