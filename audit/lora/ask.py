"""Ask: plan the prompts, captions, the trigger alone, other wordings and nothing at all.

Every question is asked twice from the same noise, with the LoRA and without it. Captions come
first: of each the first seed, then the others, then everything else.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ...shared.arrays import Float, Tensor
from ...shared.files.images import ImageFiles
from ...shared.files.prompts import PromptError
from .config import LoraAuditConfig
from .mark_clips import features_of, frame_files, middle, shared_groups
from .neighbours import duplicate_threshold, find_duplicates
from .read import Epoch, Material
from .result import Asked, DuplicateGroup, LoraFacts, TrainingSet
from .rule import Roles, count_controls
from .verdicts import thresholds
from .work import Work

Mode = Literal["on", "off", "attack"]
"""With the LoRA, without it, or guided from the base model to the LoRA."""
TEMPLATE = "a picture of {}"
EPOCHS = "images/epoch-"
"""How the paths of what saved epochs draw begin."""
MOMENTS = 3
"""Moments of training clips at which near-duplicates have to show the same."""
ALONE = 8
"""Images of the trigger alone and of the empty prompt."""
Stage = Literal["a first look", "captions", "other words", "attack"]
"""What is asked together, in this order; a page can be written after each."""
STAGES: tuple[Stage, ...] = get_args(Stage)


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
    stage: Stage


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Everything that is known before the work of hours."""

    lora: LoraFacts
    training: TrainingSet
    features: Float[Tensor, " image dimension"]
    """Embeddings of the training images, held-out ones included."""
    duplicates: tuple[DuplicateGroup, ...]
    """Among the training images, held-out ones left out."""
    groups: tuple[frozenset[int], ...]
    """Per image, held-out ones included, itself and its near-duplicates."""
    questions: tuple[Question, ...]
    shots: tuple[Shot, ...]
    epochs: tuple[tuple[Epoch, tuple[Shot, ...]], ...]
    """Saved epochs, each with its own images."""
    unknown: tuple[int, ...] | None
    """Training images whose captions hold nothing that the LoRA's header counts; None where it
    counts no words."""


def ask(material: Material, work: Work) -> Plan:
    """Return what the LoRA is asked; what looks wrong is said before it is drawn for hours.

    Raises:
        PromptError: There are too few images for a verdict; says what to give.
    """
    training, config = material.training, work.config
    if caveat := left_out(training, config):
        training = replace(training, warnings=(caveat, *training.warnings))
    for warning in (*material.lora.warnings, *training.warnings):
        work.notify(warning)
    paths, count = [training.path_of(i) for i in training.images], len(training.trained)
    features, alike = _features_and_duplicates(training, work)
    groups = groups_of(alike, len(paths))
    shots = tuple(plan_shots(training, config, material.prompts))
    planned = min(count_controls(roles_of(shots, training, groups))[:count])
    if not (limits := thresholds(planned, count, len(paths) - count)).enough:
        raise PromptError(f"Nothing was drawn, since {limits.method}")
    if duplicates := trained_groups(alike, count):
        again = sum(len(group.images) for group in duplicates)
        work.notify(f"{again} training images are near-duplicates of each other.")
    return Plan(
        lora=material.lora,
        training=training,
        features=features,
        duplicates=duplicates,
        groups=groups,
        questions=tuple(questions(training, config, material.prompts)),
        shots=shots,
        unknown=material.unknown,
        epochs=tuple((epoch, shots) for number, epoch in enumerate(material.epochs)
                     if (shots := epoch_shots(number, training, config))),
    )  # fmt: skip


def _features_and_duplicates(
    training: TrainingSet, work: Work
) -> tuple[Tensor, tuple[DuplicateGroup, ...]]:
    """Return an embedding of each image, and the near-duplicates; clips are so at every moment."""
    paths, count = [training.path_of(i) for i in training.images], len(training.trained)
    keys = [image.sha256 for image in training.images]
    if not work.subject.video:
        features = work.embed(work.features, paths, "training images")
        moments = [(features, paths)]
    else:
        folder = work.job.folder / "journal" / "frames"
        clips = [frame_files(path, folder, MOMENTS) for path in paths]
        by_moment = [
            [clip[min(place, len(clip) - 1)] for clip in clips] for place in range(MOMENTS)
        ]
        moments = [(work.embed(work.features, shown, "training clips"), shown)
                   for shown in by_moment]  # fmt: skip
        features = torch.stack([middle(rows) for rows in features_of(paths, work)])
    alike = []
    for rows, shown in moments:
        limit = duplicate_threshold(ImageFiles(shown[:count]), work.encoder.embed)
        alike.append(find_duplicates(rows, keys, limit, ImageFiles(shown)))
    return features, shared_groups(alike)


def groups_of(alike: Sequence[DuplicateGroup], count: int) -> tuple[frozenset[int], ...]:
    """Return for each of `count` images itself and its near-duplicates."""
    known = {image: frozenset(group.images) for group in alike for image in group.images}
    return tuple(known.get(image, frozenset([image])) for image in range(count))


def trained_groups(alike: Sequence[DuplicateGroup], count: int) -> tuple[DuplicateGroup, ...]:
    """Return what of the groups lies among the first `count` images, where two or more do."""
    kept = (replace(group, images=tuple(i for i in group.images if i < count)) for group in alike)
    return tuple(group for group in kept if len(group.images) > 1)


def roles_of(
    shots: Sequence[Shot], training: TrainingSet, groups: Sequence[frozenset[int]]
) -> Roles:
    """Return what images to be drawn were asked, and what training images are to each other.

    A prompt is meant for all images with its caption, and so is the caption in other words. What
    the attack and other epochs draw is judged, and is nobody's yardstick.
    """
    named: dict[str, set[int]] = {}
    for index, image in enumerate(training.images):
        if image.caption:
            named.setdefault(image.caption, set()).add(index)
    captions = [
        shot.prompt if shot.source is None else training.images[shot.source].caption
        for shot in shots
    ]
    return Roles(
        own=[frozenset(named.get(caption, ())) for caption in captions],
        on=[shot.mode != "off" for shot in shots],
        plain=[shot.mode != "attack" and not shot.path.startswith(EPOCHS) for shot in shots],
        groups=groups,
    )


def chosen_images(training: TrainingSet, most: int, *, held_out: bool = False) -> list[int]:
    """Return the images whose captions are prompts: most repeated first, then a fixed sample."""
    images = training.images
    rows = [i for i, image in enumerate(images) if image.held_out is held_out and image.caption]
    return sorted(sorted(rows, key=lambda i: (-images[i].repeats, images[i].sha256))[:most])


def left_out(training: TrainingSet, config: LoraAuditConfig) -> str:
    """Return a sentence about captions of trained images that are no prompts, "" for none."""
    captioned = len(chosen_images(training, len(training.images)))
    asked = len(chosen_images(training, config.captions))
    if asked == captioned:
        return ""
    return (
        f"The captions of {asked} of {captioned} training images are used as prompts, the most "
        "repeated first. A verdict of none on the others says only that these did not bring them "
        "out."
    )


def questions(
    training: TrainingSet, config: LoraAuditConfig, examples: Sequence[str] = ()
) -> list[Question]:
    """Return all questions but the attack's; the captions of held-out images are among them."""
    images, count = training.images, config.images_per_prompt
    trained = chosen_images(training, config.captions)
    controls = chosen_images(training, config.captions, held_out=True)
    wishes: list[tuple[str, Asked, int | None, int]] = [
        *((images[i].caption, "caption", i, count) for i in [*trained, *controls]),
        *((text, "example", None, count) for text in examples),
        *((text, "paraphrase", i, 1) for i in trained for text in paraphrases(images[i].caption)),
        *([(training.trigger, "trigger", None, ALONE)] if training.trigger else []),
        ("", "empty", None, ALONE),
    ]
    return _deal(wishes)


def attack_questions(training: TrainingSet, config: LoraAuditConfig) -> list[Question]:
    """Return the prompts of the extraction attack: every caption, else the trigger alone."""
    if not config.attack_images:
        return []
    trained = chosen_images(training, config.captions)
    wishes = [(training.images[i].caption, "attack", i, config.attack_images) for i in trained]
    return _deal(wishes or [(training.trigger, "attack", None, 4 * config.attack_images)])


def plan_shots(
    training: TrainingSet, config: LoraAuditConfig, examples: Sequence[str] = ()
) -> list[Shot]:
    """Return every image of the audit by stages; the attack comes last.

    Within a stage a batch with the LoRA and the same without it take turns, so that what is there
    when the work is stopped can be compared.
    """
    both, alone = questions(training, config, examples), attack_questions(training, config)
    modes: dict[Mode, list[Question]] = {"on": both, "off": both, "attack": alone}
    shots = []
    for mode, asked in modes.items():
        seeds = [(question, place, seed) for question in asked
                 for place, seed in enumerate(question.seeds)]  # fmt: skip
        shots += [
            Shot(prompt=question.prompt, asked=question.asked, source=question.source, seed=seed,
                 mode=mode, path=f"images/{number:05d}-{mode}.png",
                 stage=_stage(question.asked, place))
            for number, (question, place, seed) in enumerate(seeds)
        ]  # fmt: skip
    drawn: Counter[tuple[Stage, Mode]] = Counter()
    places = []
    for shot in shots:
        batch = drawn[shot.stage, shot.mode] // config.batch_size
        places.append((STAGES.index(shot.stage), batch))
        drawn[shot.stage, shot.mode] += 1
    return [shots[i] for i in sorted(range(len(shots)), key=places.__getitem__)]


def _stage(asked: Asked, place: int) -> Stage:
    """Return when a question's image at this place among its seeds is drawn."""
    if asked == "caption":
        return "captions" if place else "a first look"
    return "attack" if asked == "attack" else "other words"


def part_of(plan: Plan, shots: Sequence[Shot]) -> Plan:
    """Return the plan of an audit of which only some images are there."""
    asked = {shot.prompt for shot in shots}
    return replace(plan, shots=tuple(shots), epochs=(),
                   questions=tuple(q for q in plan.questions if q.prompt in asked))  # fmt: skip


def epoch_shots(number: int, training: TrainingSet, config: LoraAuditConfig) -> tuple[Shot, ...]:
    """Return what is drawn with a saved epoch: every caption once."""
    return tuple(
        Shot(prompt=training.images[i].caption, asked="caption", source=i, seed=place, mode="on",
             stage="captions", path=f"{EPOCHS}{number:03d}/{i:05d}-on.png")
        for place, i in enumerate(chosen_images(training, config.captions))
    )  # fmt: skip


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

    Images that share a caption take turns at its seeds, so that each gets equally many.
    """
    drawn: Counter[str] = Counter()
    dealt = []
    for prompt, asked, source, count in wishes:
        seeds = tuple(range(drawn[prompt], drawn[prompt] + count))
        drawn[prompt] += count
        dealt.append(Question(prompt=prompt, asked=asked, source=source, seeds=seeds))
    return dealt
