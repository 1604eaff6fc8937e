"""Sample prompts as they are and mitigated, side by side: the work of `unmemorize mitigate`.

    result = run_mitigation(MitigationConfig(audit=AuditConfig(model="models/mine"),
                                             texts=("a caption",), methods=("delayed_guidance",)))

Like an audit it keeps a journal: killed anywhere, the same call continues.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

from ...shared.files.storage import replace_atomically
from ...shared.mitigation import DEFAULT, METHODS, NearestNeighbour, make_method
from ...shared.sampling.guard import guard
from ...shared.score.calibration import Calibration
from ...shared.words.advice import advise
from ..common.job import Job, content_key, open_job
from ..common.measure import Bars, silent
from ..common.subject import Subject
from .comparison import Comparer
from .inputs import Inputs, read_inputs
from .mitigation_folder import summarize, write_folder
from .probing import probe_prompt
from .result import GeneratedImage, NearestImage
from .run import job_identity, subject_of
from .scoring import Scoring
from .training_images import known_images
from .trials import (
    UNMITIGATED,
    MitigationConfig,
    MitigationEntry,
    MitigationResult,
    Probed,
    Rewording,
    Sought,
    Trial,
)

DEMO_PROMPTS = {"verbatim": 4, "template": 2, "learnt": 2}
"""Captions per group that the demo shows when no prompt is named."""
SHOWN_EDITS = 6
"""Edits of a prompt that are kept, best first."""


def run_mitigation(config: MitigationConfig, bars: Bars = silent) -> MitigationResult:
    """Sample prompts with and without each method and write pictures, scores and a page.

    Args:
        config: What to sample and where to write.
        bars: Makes the progress bars.

    Raises:
        ValueError: A method or gate of that name does not exist, or no prompts were named.
        PromptError: Prompts or controls cannot be read.
        ModelError: The model or LoRA cannot be used.
        FolderTaken: The output folder holds something else.
        StorageError: Nothing can be written; what was finished is kept.
        NotEnoughControls: The controls cannot support the false-positive rate.
    """
    config = replace(config, methods=chosen_methods(config.methods))
    audit = config.audit
    inputs = read_inputs(audit, config.texts, DEMO_PROMPTS)
    subject = subject_of(audit)
    identity = {
        "work": "mitigation",
        **job_identity(audit, inputs, subject),
        "methods": list(config.methods),
        "gate": config.gate,
        "images": config.images,
        "advise": config.advise,
        "probe": config.probe,
    }
    with open_job(audit.output, identity, overwrite=audit.overwrite) as job:
        return _Mitigation(config, inputs, subject, job, job.key, bars).run()


def chosen_methods(names: Sequence[str]) -> tuple[str, ...]:
    """Return the methods to compare: the default for none, every one that needs nothing for "all".

    Raises:
        ValueError: There is no method of that name, or it needs what a command line cannot give.
    """
    if "all" in names:
        return tuple(name for name in METHODS if name != NearestNeighbour.name)
    for name in names:
        make_method(name)
    return tuple(dict.fromkeys(names)) or (DEFAULT,)


class _Mitigation:
    """The phases of one job, in order."""

    def __init__(
        self, config: MitigationConfig, inputs: Inputs, subject: Subject, job: Job, key: str,
        bars: Bars,
    ):  # fmt: skip
        self.config, self.inputs, self.subject = config, inputs, subject
        self.job, self.key, self.bars = job, key, bars
        self.ways = (UNMITIGATED, *config.methods)
        self.seeds = tuple(range(config.images))

    def run(self) -> MitigationResult:
        """Work through all phases and write the folder."""
        facts = self.subject.facts(self.job.journal("model"), self.config.audit.detection)
        scoring = Scoring(
            self.config.audit, self.inputs, self.subject, self.job, self.key, self.bars
        )
        calibration, caveat = scoring.calibrate(facts)
        scores = scoring.detect(facts, calibration).detection.scores
        prompts, flags = self.inputs.prompts.prompts, calibration.flags(scores).tolist()
        trials = self._sample(prompts, calibration)
        known = known_images(self.config.audit.model, self.inputs.prompts, self.bars)
        comparer = None
        if known is not None and len(known.thumbnails) > 1:
            comparer = Comparer(known, self.job.folder, self.bars)
        nearest = self._compare(prompts, trials, comparer)
        rewordings = self._reword(prompts, flags, calibration)
        residuals = self._probe(prompts, flags, comparer)
        entries = tuple(
            MitigationEntry(
                index=index, prompt=prompt, score=score, memorized=flag,
                trials=tuple(with_nearest(trial, nearest) for trial in trials[index]),
                rewordings=rewordings.get(index, ()), residual=residuals.get(index),
            )
            for index, (prompt, score, flag) in enumerate(
                zip(prompts, scores.tolist(), flags, strict=True)
            )
        )  # fmt: skip
        result = MitigationResult(
            config=self.config, calibration=calibration, entries=entries,
            summary=summarize(self.config, facts, calibration, entries, caveat,
                              comparer is not None and comparer.threshold is not None),
            folder=self.job.folder,
        )  # fmt: skip
        write_folder(result)
        return result

    def _sample(self, prompts: Sequence[str], calibration: Calibration) -> list[list[Trial]]:
        """Sample every prompt every way; each trial is stored as soon as it is finished."""
        journal = self.job.journal("trials")
        keys = {
            (index, way): content_key(self.key, prompt, way)
            for index, prompt in enumerate(prompts) for way in self.ways
        }  # fmt: skip
        stored = {place: self._stored(journal.get(key)) for place, key in keys.items()}
        missing = [place for place, trial in stored.items() if trial is None]
        count = len(self.seeds)
        bar = self.bars("images", len(keys) * count, (len(keys) - len(missing)) * count, "image")
        try:
            for index, way in missing:
                trial = self._trial(index, prompts[index], way, calibration)
                journal.put(keys[index, way], asdict(trial))
                stored[index, way] = trial
                bar.update(count)
        finally:
            bar.close()
        return [[stored[index, way] for way in self.ways] for index in range(len(prompts))]

    def _stored(self, values: dict[str, Any] | None) -> Trial | None:
        """Return a finished trial, None when it is none or its pictures are gone."""
        if values is None:
            return None
        images = tuple(GeneratedImage(**image) for image in values["images"])
        if not all((self.job.folder / image.path).is_file() for image in images):
            return None
        return Trial(**values | {"images": images})

    def _trial(self, index: int, prompt: str, way: str, calibration: Calibration) -> Trial:
        denoiser, audit = self.subject.denoiser, self.config.audit
        sampling = nullcontext()
        if way != UNMITIGATED:
            sampling = guard(
                denoiser.pipeline, method=make_method(way), calibration=calibration,
                gate=self.config.gate, force=audit.force,
            )  # fmt: skip
        start = time.perf_counter()
        with sampling as record:
            pictures = denoiser.generate(
                [prompt] * len(self.seeds), list(self.seeds),
                steps=audit.generation_steps, cond_scale=audit.detection.cond_scale,
            )  # fmt: skip
        seconds = (time.perf_counter() - start) / len(self.seeds)
        guarded = record.runs[-1].images if record else ()
        after = [image.score_after for image in guarded if image.score_after is not None]
        images = []
        for seed, picture in zip(self.seeds, pictures, strict=True):
            path = f"images/{index:05d}-{way}-seed{seed}.png"
            with replace_atomically(self.job.folder / path) as part:
                picture.save(part, format="PNG")
            images.append(GeneratedImage(path=path, seed=seed, nearest=None))
        return Trial(
            method=way, acted=any(image.fired for image in guarded), seconds=seconds,
            score_after=statistics.mean(after) if after else None, images=tuple(images),
        )  # fmt: skip

    def _compare(
        self, prompts: Sequence[str], trials: Sequence[Sequence[Trial]], comparer: Comparer | None
    ) -> dict[str, NearestImage]:
        """Return the training image nearest to each picture; none where none are known."""
        pairs = [(prompt, image.path) for prompt, ways in zip(prompts, trials, strict=True)
                 for trial in ways for image in trial.images]  # fmt: skip
        return comparer.nearest(pairs) if comparer else {}

    def _probe(
        self, prompts: Sequence[str], flags: Sequence[bool], comparer: Comparer | None
    ) -> dict[int, Probed]:
        """Return what the residual probe finds for prompts above the threshold."""
        chosen = [index for index, flag in enumerate(flags) if flag]
        if not self.config.probe or comparer is None:
            return {}
        journal, found = self.job.journal("residual"), {}
        bar = self.bars("residual probe", len(chosen), 0, "prompt")
        try:
            for index in chosen:
                if (key := content_key(self.key, prompts[index])) not in journal:
                    probed = probe_prompt(
                        self.subject.denoiser, comparer, self.config.audit, prompts[index],
                        self.seeds, f"{index:05d}",
                    )  # fmt: skip
                    journal.put(key, probed and asdict(probed))
                if kept := journal.get(key):
                    sought = {name: Sought(**one) if one else None for name, one in kept.items()}
                    found[index] = Probed(**sought)
                bar.update(1)
        finally:
            bar.close()
        return found

    def _reword(
        self, prompts: Sequence[str], flags: Sequence[bool], calibration: Calibration
    ) -> dict[int, tuple[Rewording, ...]]:
        """Return verified edits of the prompts above the threshold."""
        if not self.config.advise:
            return {}
        journal, found = self.job.journal("advice"), {}
        chosen = [index for index, flag in enumerate(flags) if flag]
        bar = self.bars("advice", len(chosen), 0, "prompt")
        try:
            for index in chosen:
                key = content_key(self.key, prompts[index])
                if key not in journal:
                    advice = advise(
                        self.subject.denoiser, prompts[index], calibration.threshold,
                        self.config.audit.detection,
                    )  # fmt: skip
                    journal.put(key, [
                        {"prompt": e.prompt, "edit": e.kind, "score": e.score_after,
                         "under_threshold": e.under_threshold}
                        for e in sorted(advice.candidates, key=lambda e: not e.under_threshold)[
                            :SHOWN_EDITS
                        ]
                    ])  # fmt: skip
                found[index] = tuple(Rewording(**values) for values in journal.get(key))
                bar.update(1)
        finally:
            bar.close()
        return found


def with_nearest(trial: Trial, nearest: Mapping[str, NearestImage]) -> Trial:
    """Return the trial with what its pictures resemble."""
    images = tuple(replace(image, nearest=nearest.get(image.path)) for image in trial.images)
    return replace(trial, images=images)
