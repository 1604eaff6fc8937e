"""Which words of a caption bring its training image back."""

from collections.abc import Sequence
from dataclasses import replace

from ...shared.score.detection import DetectionConfig
from ...shared.words.explanation import explain
from ..common.job import Job, content_key
from ..common.measure import Bars
from ..common.subject import Facts, Subject
from .result import ImageVerdict, TrainingSet

EXPLAINED = 6
"""Captions at most, those of the most similar images first."""
Words = tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
"""Per caption, its words with their significance."""


def explain_captions(
    verdicts: Sequence[ImageVerdict],
    training: TrainingSet,
    subject: Subject,
    facts: Facts,
    config: DetectionConfig,
    job: Job,
    key: str,
    bars: Bars,
) -> Words:
    """Return the words of the captions whose images come back; each is journalled.

    Args:
        verdicts: Of the trained images.
        training: Holds their captions.
        subject: The base model under the LoRA.
        facts: Of the same job.
        config: Seeds and steps of the scores.
        job: Holds the journal.
        key: Stands for model and settings in it.
        bars: Makes the progress bar.
    """
    back = sorted((v for v in verdicts if v.verdict == "verbatim"), key=lambda v: -v.similarity)
    captions = list(dict.fromkeys(training.images[v.image].caption for v in back))
    captions = [caption for caption in captions if caption][:EXPLAINED]
    journal, config = job.journal("words"), replace(config, batch_size=facts.rows)
    keys = {caption: content_key(key, caption) for caption in captions}
    missing = [caption for caption in captions if keys[caption] not in journal]
    bar = bars("words", len(captions), len(captions) - len(missing), "caption")
    try:
        for caption in missing:
            found = explain(subject.denoiser, caption, config)
            values = [float(value) for value in found.significance]
            journal.put(keys[caption], list(zip(found.words, values, strict=True)))
            bar.update(1)
    finally:
        bar.close()
    return tuple((caption, tuple((word, value) for word, value in journal.get(keys[caption])))
                 for caption in captions)  # fmt: skip
