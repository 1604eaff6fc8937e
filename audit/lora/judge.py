"""Judge: what the similarities say of images, epochs and the whole LoRA, and what caused it."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from ...shared.arrays import Float, Tensor
from ...shared.models.load import model_fingerprint
from ...shared.wording import counted
from ...shared.words.explanation import explain
from ..common.job import content_key
from .ask import Plan
from .attack import judge_attack
from .causes import find_causes
from .compare import Compared
from .config import settings_of
from .draw import Drawn
from .read import Epoch
from .result import Asked, EpochPoint, Generation, ImageVerdict, LoraAudit, Rate, TrainingSet
from .rule import COPY, NEAR
from .verdicts import LEVEL, fisher, judge_images, summarize, thresholds
from .words import doubt_of
from .work import Work

SAID: dict[Asked, str] = {
    "caption": "captions", "example": "example prompts", "paraphrase": "captions reworded",
    "trigger": "the trigger", "empty": "no words",
}  # fmt: skip
"""What a LoRA was asked, in a headline; the attack makes no verdict."""
EXPLAINED = 6
"""Captions at most, those of the most similar images first."""
Words = tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
"""Per caption, its words with their significance."""


def judge(
    plan: Plan, drawn: Drawn, compared: Compared, work: Work, *, words: bool = True
) -> LoraAudit:
    """Return everything the page shows and the files hold; without words nothing is measured."""
    subject, evidence, generations = work.subject, compared.evidence, compared.generations
    controls = evidence.marked.controls[: evidence.trained]
    limits = thresholds(min(controls), evidence.trained, len(evidence.held_out))
    verdicts = judge_images(evidence, compared.ceilings, enough=limits.enough)
    headline = summarize(
        verdicts, evidence, limits, compared.instrument,
        asked=asked_of(generations), doubt=doubt_of(plan, drawn.scores, work),
    )  # fmt: skip
    near = [bool(evidence.near(v.image, lora=False).any()) for v in verdicts]
    points = tuple(
        judge_epoch(epoch, *found, verdicts, near, rise)
        for (epoch, _), found, rise in zip(plan.epochs, compared.epochs, drawn.rises, strict=True)
    )
    audit = LoraAudit(
        model=subject.name,
        video=subject.video,
        model_fingerprint=model_fingerprint(subject.location, None, subject.revision),
        lora=plan.lora,
        training=plan.training,
        duplicates=plan.duplicates,
        scores=drawn.scores,
        generations=generations,
        verdicts=verdicts,
        thresholds=limits,
        headline=headline,
        positive_control=compared.instrument,
        attack=judge_attack(compared.rows, generations, evidence.trained),
        epochs=points,
        best_epoch=best_epoch(points),
        words=explain_captions(verdicts, plan.training, work) if words else (),
        settings=settings_of(work.config, work.facts, work.features.name),
        folder=work.job.folder,
    )
    return replace(audit, causes=find_causes(audit))


def asked_of(generations: Sequence[Generation]) -> str:
    """Return what was asked with the LoRA on, as in "captions and no words (40 images)"."""
    plain = [made.asked for made in generations if made.lora and made.asked in SAID]
    kinds = [said for asked, said in SAID.items() if asked in plain]
    listed = ", ".join(kinds[:-1]) + (" and " if len(kinds) > 1 else "") + kinds[-1]
    return f"{listed} ({counted(len(plain), 'image', 'images')})"


def judge_epoch(
    epoch: Epoch,
    best: Float[Tensor, " image"],
    marks: Float[Tensor, " image"],
    verdicts: Sequence[ImageVerdict],
    near_before: Sequence[bool],
    score: float,
) -> EpochPoint:
    """Return the point of one epoch.

    It is inside when no image comes back verbatim but those that the base model draws, and when
    the images that come nearer than controls are no more than chance makes of those that do with
    the LoRA off (Fisher's exact test).

    Args:
        epoch: The file.
        best: Per training image, its most similar generation of this epoch.
        marks: Per training image, the gravest of its own words.
        verdicts: Of the audited file.
        near_before: Which images come nearer than controls with the LoRA off.
        score: Mean LoRA-on minus LoRA-off score of the captions.
    """
    given = [v.verdict != "base" for v in verdicts]
    copies = sum(int(grave) == COPY and own for grave, own in zip(marks, given, strict=True))
    near, n = int((marks >= NEAR).sum()), len(best)
    return EpochPoint(
        name=epoch.path.name, epoch=epoch.number, score=score, similarity=float(best.mean()),
        reproduced=Rate.of(copies, n),
        inside=not copies and fisher(near, n, sum(near_before), n) >= LEVEL,
    )  # fmt: skip


def best_epoch(points: Sequence[EpochPoint]) -> int | None:
    """Return the position of the last epoch before any that is outside; None when the first is."""
    outside = next((i for i, point in enumerate(points) if not point.inside), len(points))
    return outside - 1 if outside else None


def explain_captions(verdicts: Sequence[ImageVerdict], training: TrainingSet, work: Work) -> Words:
    """Return which words bring verbatim images back; each caption is journalled."""
    back = sorted((v for v in verdicts if v.verdict == "verbatim"), key=lambda v: -v.similarity)
    captions = list(dict.fromkeys(training.images[v.image].caption for v in back))
    keys = {caption: content_key(work.job.key, caption) for caption in captions if caption}
    keys = dict(list(keys.items())[:EXPLAINED])
    journal = work.job.journal("words")
    detection = work.config.detection
    config = replace(detection, seeds=detection.seeds[:1], batch_size=work.facts.rows)
    missing = [caption for caption, key in keys.items() if key not in journal]
    with closing(work.bars("words", len(keys), len(keys) - len(missing), "caption")) as bar:
        for caption in missing:
            explained = explain(work.subject.denoiser, caption, config)
            # Without a word that carries nothing the score rises; not all of many are left out.
            values = [value if value > 0 else 0.0 for value in explained.significance]
            journal.put(keys[caption], list(zip(explained.words, values, strict=True)))
            bar.update(1)
    return tuple((caption, tuple((word, value) for word, value in journal.get(key)))
                 for caption, key in keys.items())  # fmt: skip
