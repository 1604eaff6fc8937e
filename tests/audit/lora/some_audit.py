"""The audit of a LoRA made by hand, as full as a real one, with real small pictures and no model.

The first images come back when their caption is asked for, the others never do.
"""

from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from unmemorize import demo
from unmemorize.audit.lora.causes import find_causes
from unmemorize.audit.lora.result import (
    MARKS,
    Attack,
    Clique,
    DuplicateGroup,
    EpochPoint,
    Generation,
    Headline,
    ImageVerdict,
    LoraAudit,
    LoraFacts,
    Mark,
    PositiveControl,
    PromptScore,
    Rate,
    Thresholds,
    TrainingImage,
    TrainingSet,
)
from unmemorize.demo.data import RESOLUTION, cut_sheet
from unmemorize.shared.score.rates import clopper_pearson

HOSTILE = (
    "</style></script><img src=x onerror=alert(1)>\"'`{{7*7}}<script>alert(2)</script>"
    "\x00\x1b\u202e"
)
HOSTILE_NAME = "<img src=x onerror=alert(3)> \"'`&\u202e.png"
"""What a file may be called on Linux."""
VERBATIM, NEAR = 0.75, 0.55
SEEDS = 2


def rate(count: int, total: int) -> Rate:
    low, high = clopper_pearson(count, total)
    return Rate(count=count, total=total, low=low, high=high)


@cache
def drawings() -> list[tuple[str, Image.Image]]:
    """Return captions and drawings that the demo model was trained on, 128 pixels."""
    captions = [c.text for c in demo.captions() if c.group in ("verbatim", "template")]
    sheet = cut_sheet(demo.IMAGES / "repeated.webp", RESOLUTION, len(captions))
    return list(zip(captions, sheet, strict=True))


def shown(index: int) -> int:
    """Return the drawing of a training image: the second is a copy of the first."""
    return 0 if index == 1 else index


def make_folder(folder: Path, images: int, held_out: int, text: str, name: str) -> TrainingSet:
    """Write images with caption files in kohya's layout and return them as they would be read."""
    inside = folder / "10_zyx thing"
    inside.mkdir(parents=True)
    rows = []
    for index in range(images + held_out):
        path = inside / (name if name and index == 0 else f"{index:02d}.png")
        words, drawing = drawings()[shown(index)]
        drawing.save(path)
        caption = text or f"zyx thing, {words}"
        path.with_suffix(".txt").write_bytes(caption.encode("utf-8", "replace"))
        rows.append(TrainingImage(
            name=path.relative_to(folder).as_posix(), caption=caption, repeats=10,
            sha256=sha256(path.read_bytes()).hexdigest(), size=(128, 128),
            held_out=index >= images,
        ))  # fmt: skip
    return TrainingSet(
        folder=folder, layout="kohya", images=tuple(rows), trigger=text or "zyx",
        warnings=(text,) if text else (),
    )  # fmt: skip


def plan(training: TrainingSet) -> list[dict]:
    """Return what is asked for, each twice: with the LoRA and without."""
    asked = [("caption", i.caption, n) for n, i in enumerate(training.images) if not i.held_out]
    asked += [("paraphrase", f"{prompt}, again", n) for _, prompt, n in asked]
    asked += [("trigger", training.trigger, None), ("empty", "", None)]
    both = [
        {"asked": kind, "prompt": prompt, "source": source, "seed": seed, "lora": lora}
        for kind, prompt, source in asked
        for seed in range(SEEDS)
        for lora in (True, False)
    ]
    attack = [
        {"asked": "attack", "prompt": training.images[n % 2].caption, "source": n % 2, "seed": n,
         "lora": True}
        for n in range(8)
    ]  # fmt: skip
    return both + attack


def mark_of(similarity: float) -> Mark:
    return "verbatim" if similarity > VERBATIM else "near" if similarity > NEAR else ""


def make_generations(
    folder: Path, training: TrainingSet, reproduced: int
) -> tuple[tuple[Generation, ...], np.ndarray]:
    """Write the pictures and return them with their similarities [generation image]."""
    rng = np.random.default_rng(0)
    asked = plan(training)
    matrix = rng.uniform(0.05, 0.4, (len(asked), len(training.images)))
    made = []
    (folder / "images").mkdir(parents=True)
    for number, one in enumerate(asked):
        source = one["source"]
        copied = one["lora"] and source is not None and source < reproduced
        if copied:
            strength = {"caption": 0.3, "paraphrase": 0.05, "attack": 0.25}[one["asked"]]
            matrix[number, source] = 0.6 + strength + rng.uniform(0, 0.05)
        _, picture = drawings()[shown(source) if copied else (40 + number) % len(drawings())]
        picture = ImageEnhance.Color(picture).enhance(1.2 if one["lora"] else 0.3)
        path = f"images/{number:04d}.png"
        picture.save(folder / path)
        nearest = int(matrix[number].argmax())
        similarity = float(matrix[number, nearest])
        made.append(Generation(path=path, nearest=nearest, similarity=similarity,
                               mark=mark_of(similarity), **one))  # fmt: skip
    matrix = matrix.astype(np.float32)
    marks = np.vectorize(lambda cosine: MARKS.index(mark_of(cosine)))(matrix).astype(np.uint8)
    np.savez(folder / "similarity.npz", matrix=matrix, marks=marks)
    return tuple(made), matrix


def judge(
    training: TrainingSet, generations: tuple[Generation, ...], matrix: np.ndarray, given: bool
) -> tuple[ImageVerdict, ...]:
    limit, near = (VERBATIM, NEAR) if given else (2.0, 2.0)
    on = np.array([g.lora for g in generations])
    rows = []
    for index in (n for n, image in enumerate(training.images) if not image.held_out):
        best = int(np.where(on, matrix[:, index], -1).argmax())
        similarity = float(matrix[best, index])
        rows.append(ImageVerdict(
            image=index, similarity=similarity, control=float(matrix[~on, index].max()),
            verdict="verbatim" if similarity > limit else "near" if similarity > near else "none",
            ceiling=0.97, generation=best,
            attracted=sum(g.nearest == index for g in generations),
            closeness=(1 - similarity) / (1 - VERBATIM) if given else None,
            closeness_off=3.0 if given else None,
        ))  # fmt: skip
    return tuple(rows)


def make_epochs(images: int, reproduced: int, text: str) -> tuple[EpochPoint, ...]:
    counts = [0, 0, reproduced // 2, reproduced]
    return tuple(
        EpochPoint(
            name=f"{text}{number:06d}.safetensors", epoch=number, score=0.2 + 0.3 * number,
            similarity=0.3 + 0.1 * number, reproduced=rate(count, images),
            inside=count == 0,
        )
        for number, count in enumerate(counts, 1)
    )  # fmt: skip


def make_headline(reproduced: int, images: int, given: bool, text: str) -> Headline:
    said = text or (
        f"{reproduced} of {images} training images come back, against 0 of 40 controls." if given
        else "4 controls cannot carry a threshold: 20 are needed."
    )  # fmt: skip
    return Headline(
        text=said, given=given, reproduced=rate(reproduced, images), controls=rate(0, 40),
        p_value=0.0004 if given else None,
    )  # fmt: skip


def make_audit(
    folder: Path, *, images: int = 8, reproduced: int = 3, held_out: int = 2, given: bool = True,
    epochs: bool = True, text: str = "", name: str = "",
) -> LoraAudit:  # fmt: skip
    """Return an audit whose first `reproduced` images come back verbatim.

    Args:
        folder: Gets `out` (pictures and similarity.npz) and `training`.
        images: Trained on.
        reproduced: Of them.
        held_out: Further images, controls.
        given: The counts carry a headline.
        epochs: Several files were given; their curve takes most of a page's time.
        text: Stands in every field that holds somebody's words.
        name: Of the first image's file.
    """
    training = make_folder(folder / "training", images, held_out, text, name)
    out = folder / "out"
    generations, matrix = make_generations(out, training, reproduced)
    lora = LoraFacts(
        name=f"{text}mine.safetensors", sha256="cd" * 32, dialect="kohya", kinds=("lora",),
        rank=32, modules=64, epoch=4, epochs=4, steps=320, images=10 * images,
        base_name=text or "model", base_hash=text or "ab12",
        says=(text or "The header says 80 images times repeats, and so does the folder.",),
        warnings=(text,) if text else (),
    )  # fmt: skip
    scores = tuple(
        PromptScore(prompt=g.prompt, asked=g.asked, source=g.source, on=4.5 - 0.2 * n, off=2.0)
        for n, g in enumerate(g for g in generations if g.seed == 0 and g.lora)
        if g.asked != "attack"
    )
    attack = Attack(
        generations=8, guidance=5.0, extracted=rate(min(reproduced, 2), images),
        cliques=tuple(
            Clique(size=4, member=g.path, nearest=g.nearest, similarity=g.similarity,
                   extracted=g.similarity > VERBATIM)
            for g in generations if g.asked == "attack" and g.seed < 2
        ),
    )  # fmt: skip
    points = make_epochs(images, reproduced, text) if epochs else ()
    captions = dict.fromkeys(i.caption for i in training.images[:reproduced])
    audit = LoraAudit(
        model=text or "model", model_fingerprint="ab" * 32, lora=lora, training=training,
        duplicates=(DuplicateGroup(images=(0, 1), exact=True, similarity=1.0),),
        scores=scores, generations=generations,
        verdicts=judge(training, generations, matrix, given),
        thresholds=Thresholds(
            controls=40, enough=given,
            method=text or "Above all 40 controls of this run: the LoRA off, same prompts, seeds.",
        ),
        headline=make_headline(reproduced, images, given, text),
        positive_control=PositiveControl(
            found=rate(5, 5), works=True,
            detail=text or "The demo model was asked for 5 planted duplicates; 5 came back.",
        ),
        attack=attack, epochs=points,
        best_epoch=max((n for n, point in enumerate(points) if point.inside), default=None),
        words=tuple(
            (caption, tuple((word, 1.0 + n % 3) for n, word in enumerate(caption.split())))
            for caption in captions
        ),
        settings=(("seeds", "0, 1"), ("steps", "30"), (text or "torch", text or "2.13"),
                  ("command", text or "unmemorize audit model --lora mine.safetensors "
                   "--images training")),
        folder=out,
    )  # fmt: skip
    return replace(audit, causes=find_causes(audit))
