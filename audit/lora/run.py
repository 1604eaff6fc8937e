"""Run an audit of a LoRA: ask, draw, compare, judge, write; killed anywhere, it continues.

    audit = run_lora_audit(LoraAuditConfig(lora=Path("my.safetensors"), images=Path("my_images")))

Whatever takes time is stored as soon as it is finished: scores in ``<output>/journal``, images as
files that are whole or absent. All that is written follows from these, so that an audit that was
stopped and continued ends with the same bytes as one that was not.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from ...shared.dependencies import has, require
from ...shared.files.images import ImageFiles
from ...shared.models.load import model_fingerprint
from ..common.job import Job, check_folder, content_key, holds, open_job
from ..common.measure import Bars, silent
from ..common.sscd import Sscd
from .advice import find_causes
from .asking import Shot, chosen_images, left_out, plan_shots, questions
from .comparing import References, layout_similarities, refer, save_matrix
from .config import LoraAuditConfig
from .drawing import Subjects, batches
from .duplicates import duplicate_threshold, find_duplicates
from .epochs import Epoch, best_epoch, epoch_batches, judge_epoch, read_epochs
from .estimate import estimate
from .extraction import judge_attack
from .feature_cache import FeatureCache
from .header import read_header
from .lora_file import read_lora_facts
from .positive_control import positive_control
from .result import (
    MATRIX,
    DuplicateGroup,
    EpochPoint,
    Generation,
    LoraAudit,
    Thresholds,
    TrainingSet,
)
from .scores import Scoring
from .settings import identity_of, settings_of
from .spread import draw_all
from .tell import tell
from .thresholds import near_threshold, thresholds
from .training_set import path_of, read_training_set
from .verdicts import Evidence, judge_images, summarize
from .words import explain_captions

NEEDS = {"reports": ("jinja2", "PIL", "scipy"), "models": ("peft", "accelerate"),
         "sscd": ("faiss",)}  # fmt: skip
Notify = Callable[[str], object]
"""Takes a sentence for the user."""


def run_lora_audit(
    config: LoraAuditConfig, bars: Bars = silent, notify: Notify = lambda sentence: None
) -> LoraAudit:
    """Audit a LoRA and write page, files and pictures into `config.output`.

    Args:
        config: What to audit and where to write.
        bars: Makes the progress bars.
        notify: Takes sentences, before hours of work, about what looks wrong and how long it takes.

    Raises:
        ImportError: An optional package is missing; says what to type.
        ModelError: The model or a LoRA cannot be used.
        PromptError: The training folder cannot be read.
        ValueError: The epochs cannot be read.
        FolderTaken: The output folder holds something else.
        StorageError: Nothing can be written; what was finished is kept.
        DrawingError: One of several processes has failed; what was finished is kept.
    """
    for extra, modules in NEEDS.items():  # before hours of work, not after
        for module in modules:
            if not has(module):
                require(module, purpose="An audit of a LoRA", extra=extra)
    encoder = Sscd()
    cache, epochs = FeatureCache(encoder), read_epochs(config.epochs)
    training = read_training_set(
        config.images, trigger=config.trigger, header=read_header(config.lora),
        held_out=config.held_out, reserve=config.reserve,
    )  # fmt: skip
    if caveat := left_out(training, config):
        training = replace(training, warnings=(caveat, *training.warnings))
    subjects = Subjects(config)
    subject = subjects.under(config.lora)
    identity = identity_of(config, training, epochs, subject, cache.name)
    check_folder(config.output, identity, overwrite=config.overwrite)
    if not holds(config.output, identity):
        try:  # what cannot be loaded must not leave a folder behind that names its job
            subject.denoiser  # noqa: B018
        except BaseException:
            with suppress(OSError):
                config.output.rmdir()
            raise
    with open_job(config.output, identity, overwrite=config.overwrite) as job:
        work = _LoraAudit(config, training, epochs, subjects, encoder, cache, job,
                          content_key(identity), bars, notify)  # fmt: skip
        audit = work.run()
        tell(audit, include_images=config.include_images)
    return audit


class _LoraAudit:
    """The phases of one job, in order."""

    def __init__(
        self,
        config: LoraAuditConfig,
        training: TrainingSet,
        epochs: Sequence[Epoch],
        subjects: Subjects,
        encoder: Sscd,
        cache: FeatureCache,
        job: Job,
        key: str,
        bars: Bars,
        notify: Notify,
    ):
        self.config, self.training, self.epochs, self.subjects = config, training, epochs, subjects
        self.encoder, self.cache, self.job, self.key = encoder, cache, job, key
        self.bars, self.notify = bars, notify
        self.subject = subjects.under(config.lora)
        self.drawn = FeatureCache(encoder, job.folder / "journal" / "features")
        self.trained = [i for i, image in enumerate(training.images) if not image.held_out]
        self.shots = plan_shots(training, config)

    def run(self) -> LoraAudit:
        """Work through all phases."""
        config, training, subject = self.config, self.training, self.subject
        lora = read_lora_facts(config.lora, training, subject.location)
        for warning in (*lora.warnings, *training.warnings):
            self.notify(warning)
        instrument = positive_control(self.encoder, self.cache.name, subject.device, self.bars)
        facts = subject.facts(self.job.journal("model"), config.detection)
        scoring = Scoring(facts, config, self.job, self.key, self.bars)
        scores = scoring.questions(questions(training, config), subject)
        paths = [path_of(training, image) for image in training.images]
        references = refer(paths, subject, self.job, self.bars, cache=self.cache, drawn=self.drawn)
        duplicates = self._duplicates(references)
        rows = self._draw()
        evidence = self._evidence(rows, references)
        limits = thresholds(
            evidence.best(evidence.off)[: evidence.trained], evidence.held_out,
            references.peers(self._different(duplicates)),
        )  # fmt: skip
        layout_limit = near_threshold(evidence.layout_controls)
        verdicts = judge_images(evidence, references.ceilings, limits, layout_limit)
        words = explain_captions(
            verdicts, training, subject, facts, config.detection, self.job, self.key, self.bars
        )
        generations = self._generations(rows, references)
        points = self._epochs(references, evidence, limits, scoring)
        audit = LoraAudit(
            model=subject.name,
            model_fingerprint=model_fingerprint(subject.location, None, config.revision),
            lora=lora,
            training=training,
            duplicates=duplicates,
            scores=scores,
            generations=generations,
            verdicts=verdicts,
            thresholds=limits,
            headline=summarize(verdicts, evidence, limits, instrument),
            positive_control=instrument,
            attack=judge_attack(rows, generations, limits, len(self.trained)),
            epochs=points,
            best_epoch=best_epoch(points),
            words=words,
            settings=settings_of(config, facts, self.cache.name),
            folder=self.job.folder,
        )
        return replace(audit, causes=find_causes(audit))

    def _draw(self) -> torch.Tensor:
        """Draw all images and return their embeddings."""
        planned = batches(self.config.lora, self.shots, self.config.batch_size)
        self.notify(estimate(planned, self.subject, self.job.folder, self.config))
        draw_all(planned, self.subjects, self.config, self.job, self.bars)
        return self._embed(self.shots)

    def _evidence(self, rows: torch.Tensor, references: References) -> Evidence:
        """Compare all images, and keep the matrix with the job."""
        matrix = references.similarities(rows)
        save_matrix(self.job.folder / MATRIX, matrix)
        on, off = ([i for i, shot in enumerate(self.shots) if shot.mode == mode]
                   for mode in ("on", "off"))  # fmt: skip
        layouts = layout_similarities(self._files(self.shots), references)
        return Evidence(matrix=matrix, layouts=layouts, on=on, off=off, trained=len(self.trained))

    def _files(self, shots: Sequence[Shot]) -> list[Path]:
        return [self.job.folder / shot.path for shot in shots]

    def _embed(self, shots: Sequence[Shot]) -> torch.Tensor:
        bar = self.bars("similarity", len(shots), 0, "image")
        try:
            return self.drawn.rows(self._files(shots), progress=bar.update)
        finally:
            bar.close()

    def _duplicates(self, references: References) -> tuple[DuplicateGroup, ...]:
        images = [self.training.images[i] for i in self.trained]
        files = ImageFiles([path_of(self.training, image) for image in images])
        limit = duplicate_threshold(files, self.encoder.embed)
        found = find_duplicates(references.rows[self.trained], [i.sha256 for i in images], limit)
        if found:
            again = sum(len(group.images) for group in found)
            self.notify(f"{again} training images are near-duplicates of each other.")
        return found

    def _different(self, duplicates: Sequence[DuplicateGroup]) -> list[int]:
        """Return the trained images, of near-duplicates the first."""
        again = {image for group in duplicates for image in group.images[1:]}
        return [i for i in self.trained if i not in again]

    def _generations(self, rows: torch.Tensor, references: References) -> tuple[Generation, ...]:
        nearest, similarities = references.nearest(rows, self.trained)
        return tuple(
            Generation(
                path=shot.path, prompt=shot.prompt, asked=shot.asked, source=shot.source,
                seed=shot.seed, lora=shot.mode != "off", nearest=image, similarity=similarity,
            )
            for shot, image, similarity in zip(self.shots, nearest, similarities, strict=True)
        )  # fmt: skip

    def _epochs(
        self, references: References, evidence: Evidence, limits: Thresholds, scoring: Scoring
    ) -> tuple[EpochPoint, ...]:
        """Draw, score and judge one saved epoch after the other; what the base does is known."""
        training, points = self.training, []
        captions = list(dict.fromkeys(
            training.images[i].caption for i in chosen_images(training, self.config.captions)
        ))  # fmt: skip
        if not self.epochs or not captions:
            return ()
        base = scoring.scores(captions, self.subject, lora=False)
        count = evidence.trained
        control = evidence.best(evidence.off)[:count]
        planned = epoch_batches(self.epochs, training, self.config)
        for epoch, some in zip(self.epochs, planned, strict=True):
            draw_all(some, self.subjects, self.config, self.job, self.bars)
            rows = self._embed([shot for batch in some for shot in batch.shots])
            best = references.similarities(rows).amax(0)[:count]
            with_lora = scoring.scores(captions, self.subjects.under(epoch.path), lora=True)
            rises = [with_lora[caption] - base[caption] for caption in captions]
            score = sum(rises) / len(rises)
            points.append(judge_epoch(epoch, best, control, limits, score))
        return tuple(points)
