"""Judge: what the similarities say of images, epochs and the whole LoRA, and what caused it."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from ...shared.arrays import Float, Tensor
from ...shared.models.load import model_fingerprint
from ...shared.words.explanation import explain
from ..common.job import content_key
from .ask import Plan
from .attack import judge_attack
from .causes import find_causes
from .compare import Compared
from .config import settings_of
from .draw import Drawn
from .read import Epoch
from .result import EpochPoint, ImageVerdict, LoraAudit, Rate, Thresholds, TrainingSet
from .verdicts import LEVEL, fisher, weigh
from .work import Work

EXPLAINED = 6
"""Captions at most, those of the most similar images first."""
Words = tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
"""Per caption, its words with their significance."""


def judge(plan: Plan, drawn: Drawn, compared: Compared, work: Work) -> LoraAudit:
    """Return everything the page shows and the files hold."""
    subject, evidence, generations = work.subject, compared.evidence, compared.generations
    limits, verdicts, headline = weigh(
        evidence, compared.ceilings, compared.peers, compared.instrument
    )
    points = tuple(
        judge_epoch(epoch, best, evidence.off_best, limits, rise)
        for (epoch, _), best, rise in zip(plan.epochs, compared.epochs, drawn.rises, strict=True)
    )
    audit = LoraAudit(
        model=subject.name,
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
        attack=judge_attack(compared.rows, generations, limits, evidence.trained),
        epochs=points,
        best_epoch=best_epoch(points),
        words=explain_captions(verdicts, plan.training, work),
        settings=settings_of(work.config, work.facts, work.features.name),
        folder=work.job.folder,
    )
    return replace(audit, causes=find_causes(audit))


def judge_epoch(
    epoch: Epoch,
    best: Float[Tensor, " image"],
    control: Float[Tensor, " image"],
    limits: Thresholds,
    score: float,
) -> EpochPoint:
    """Return the point of one epoch.

    It is inside when no more images come back verbatim than controls do, and when the images that
    are nearer than `near` are no more than chance makes of the controls (Fisher's exact test).

    Args:
        epoch: The file.
        best: Per training image, its most similar generation of this epoch.
        control: The same without a LoRA.
        limits: Of the audit.
        score: Mean LoRA-on minus LoRA-off score of the captions.
    """
    if limits.near is None or limits.verbatim is None:
        copies, inside = 0, False
    else:
        copies = int((best > limits.verbatim).sum())
        beyond, likely = (int((each > limits.near).sum()) for each in (best, control))
        inside = copies <= int((control > limits.verbatim).sum()) and (
            fisher(beyond, len(best), likely, len(control)) >= LEVEL
        )
    return EpochPoint(
        name=epoch.path.name, epoch=epoch.number, score=score, similarity=float(best.mean()),
        reproduced=Rate.of(copies, len(best)), inside=inside,
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
