"""What a LoRA is asked: its captions, the trigger alone, other wordings, and nothing at all.

Every question is asked twice from the same noise, with the LoRA and without it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .config import LoraAuditConfig
from .result import Asked, TrainingSet

Mode = Literal["on", "off", "attack"]
"""With the LoRA, without it, or guided from the base model to the LoRA."""
TEMPLATE = "a picture of {}"
ALONE = 4
"""Times `images_per_prompt` that the trigger and the empty prompt are drawn."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and the noises it is drawn from."""

    prompt: str
    asked: Asked
    source: int | None
    """Training image whose caption or paraphrase it is."""
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One image to generate."""

    prompt: str
    asked: Asked
    source: int | None
    seed: int
    mode: Mode
    path: str
    """Relative to the output folder."""


def chosen_images(training: TrainingSet, most: int, *, held_out: bool = False) -> list[int]:
    """Return the images whose captions are asked: most repeated first, then a fixed sample."""
    rows = [i for i, image in enumerate(training.images)
            if image.held_out is held_out and image.caption]  # fmt: skip
    images = training.images
    return sorted(sorted(rows, key=lambda i: (-images[i].repeats, images[i].sha256))[:most])


def left_out(training: TrainingSet, config: LoraAuditConfig) -> str:
    """Return a sentence about trained images whose own captions are not asked, "" when all are."""
    captioned = len(chosen_images(training, len(training.images)))
    asked = len(chosen_images(training, config.captions))
    if asked == captioned:
        return ""
    return (
        f"The captions of {asked} of {captioned} training images are asked, the most repeated "
        "first. A verdict of none on the others says only that these did not bring them out."
    )


def questions(training: TrainingSet, config: LoraAuditConfig) -> list[Question]:
    """Return all questions but the attack's; the captions of held-out images are among them."""
    images, count = training.images, config.images_per_prompt
    trained = chosen_images(training, config.captions)
    controls = chosen_images(training, config.captions, held_out=True)
    wishes: list[tuple[str, Asked, int | None, int]] = [
        *((images[i].caption, "caption", i, count) for i in [*trained, *controls]),
        *((text, "paraphrase", i, 1) for i in trained for text in paraphrases(images[i].caption)),
        *([(training.trigger, "trigger", None, ALONE * count)] if training.trigger else []),
        ("", "empty", None, ALONE * count),
    ]
    return _deal(wishes)


def attack_questions(training: TrainingSet, config: LoraAuditConfig) -> list[Question]:
    """Return what the extraction attack asks for: every caption, else the trigger alone."""
    if not config.attack_images:
        return []
    trained = chosen_images(training, config.captions)
    wishes = [(training.images[i].caption, "attack", i, config.attack_images) for i in trained]
    alone = (training.trigger, "attack", None, ALONE * config.attack_images)
    return _deal(wishes or [alone])


def plan_shots(training: TrainingSet, config: LoraAuditConfig) -> list[Shot]:
    """Return every image of the audit: each question with the LoRA and without, then the attack."""
    twins = [(question, seed) for question in questions(training, config)
             for seed in question.seeds]  # fmt: skip
    alone = [(question, seed) for question in attack_questions(training, config)
             for seed in question.seeds]  # fmt: skip
    modes: list[tuple[Mode, list[tuple[Question, int]]]] = [
        ("on", twins), ("off", twins), ("attack", alone),
    ]  # fmt: skip
    return [
        Shot(prompt=question.prompt, asked=question.asked, source=question.source, seed=seed,
             mode=mode, path=f"images/{number:05d}-{mode}.png")
        for mode, asked in modes for number, (question, seed) in enumerate(asked)
    ]  # fmt: skip


def paraphrases(caption: str) -> tuple[str, ...]:
    """Return the same wish in other words, simple and always the same.

    Its parts, or its words where it has no commas, in the opposite order; every other of them;
    and the whole caption in a neutral sentence.
    """
    mark = "," if "," in caption else None
    parts = [part.strip() for part in caption.split(mark) if part.strip()]
    joint = ", " if mark else " "
    texts = (joint.join(parts[::-1]), joint.join(parts[::2]), TEMPLATE.format(caption))
    return tuple(text for text in dict.fromkeys(texts) if text != caption)


def _deal(wishes: Iterable[tuple[str, Asked, int | None, int]]) -> list[Question]:
    """Give each wish its own seeds: no prompt is drawn from one noise twice.

    Images that share a caption take turns at its seeds, so that each is asked for equally often.
    """
    drawn: Counter[str] = Counter()
    dealt = []
    for prompt, asked, source, count in wishes:
        seeds = tuple(range(drawn[prompt], drawn[prompt] + count))
        drawn[prompt] += count
        dealt.append(Question(prompt=prompt, asked=asked, source=source, seeds=seeds))
    return dealt
