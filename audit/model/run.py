"""Run an audit: detect, explain, picture, compare, write; killed anywhere, it continues.

    result = run_audit(AuditConfig(model="models/mine", prompts=(Path("captions.txt"),)))

Everything that takes time is stored in ``<output>/journal`` as soon as it is finished, keyed by its
content. The files of the result are then written from the journals alone, so that an audit that was
stopped and continued ends with the same bytes as one that was not.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ...shared.dependencies import has, require
from ...shared.files.storage import write_text
from ...shared.score.calibration import (
    Calibration,
    NotEnoughControls,
    controls_needed,
    prompts_sha256,
    settings_of,
)
from ..common.job import Job, content_key, open_job
from ..common.measure import Bars, Measured, silent
from ..common.result import dumps, versions
from ..common.subject import Subject
from .comparison import Comparison, compare
from .config import AuditConfig
from .explain import draw_maps, explain_flagged, to_words
from .generation import Sampled, generate_images, plan_images, unfinished
from .inputs import Inputs, read_inputs
from .result import AuditEntry, AuditResult, GeneratedImage, WordSignificance
from .scoring import Scoring
from .summary import settings, summarize

__all__ = ["AuditConfig", "AuditEntry", "AuditResult", "run_audit"]


def run_audit(config: AuditConfig, bars: Bars = silent) -> AuditResult:
    """Audit a model and write report, results and pictures into `config.output`.

    Args:
        config: What to audit and where to write.
        bars: Makes the progress bars.

    Raises:
        ModelError: The model or LoRA cannot be used.
        PromptError: Prompts or controls cannot be read.
        FolderTaken: The output folder holds something else.
        StorageError: Nothing can be written; what was finished is kept.
        CalibrationMismatch: The given calibration is for another model or setting.
        NotEnoughControls: The controls cannot support the false-positive rate.
    """
    for module in ("jinja2", "PIL", "scipy"):  # before hours of work, not after
        if not has(module):
            require(module, purpose="An audit", extra="reports")
    inputs = read_inputs(config)
    subject = subject_of(config)
    identity = job_identity(config, inputs, subject)
    with open_job(
        config.output, identity, overwrite=config.overwrite,
        check=lambda: check_means(config, inputs, subject),
    ) as job:  # fmt: skip
        return _Audit(config, inputs, subject, job, job.key, bars).run()


def subject_of(config: AuditConfig) -> Subject:
    """Return the model that the settings name."""
    return Subject(
        config.model, lora=config.lora, device=config.device, dtype=config.dtype,
        revision=config.revision, resolution=config.resolution, config=config.model_config,
    )  # fmt: skip


def job_identity(config: AuditConfig, inputs: Inputs, subject: Subject) -> dict[str, Any]:
    """Return all that decides the results; equal identities may share a folder."""
    calibration = Calibration.load(config.calibration) if config.calibration else None
    return {
        "model": subject.fingerprint,
        "device": subject.device,
        "dtype": subject.dtype,
        "resolution": subject.resolution,
        "prompts": prompts_sha256([*inputs.prompts.prompts, *map(str, inputs.prompts.sources)]),
        "controls": None if calibration else prompts_sha256(inputs.controls),
        "calibration": calibration and content_key(asdict(calibration), config.force),
        **settings(config),
        **{f"version of {name}": number for name, number in versions().items()},
    }


def check_means(config: AuditConfig, inputs: Inputs, subject: Subject) -> None:
    """Load the model, and see that the calibration or the controls can carry a verdict.

    Raises:
        ModelError: The model cannot be loaded.
        CalibrationMismatch: The given calibration is for another model or setting.
        NotEnoughControls: The controls cannot support the false-positive rate.
    """
    needed = controls_needed(config.false_positive_rate)
    if not config.calibration and len(inputs.controls) < needed:
        raise NotEnoughControls(
            "not enough controls for this claim: a false-positive rate of "
            f"{config.false_positive_rate} needs at least {needed} different controls, found "
            f"{len(inputs.controls)}. Add controls, or ask for a higher --false-positive-rate."
        )
    settings_now = settings_of(subject.denoiser, config.detection)
    if config.calibration:
        calibration = Calibration.load(config.calibration)
        calibration.check(subject.fingerprint, settings_now, force=config.force)


class _Audit:
    """The phases of one job, in order."""

    def __init__(
        self, config: AuditConfig, inputs: Inputs, subject: Subject, job: Job, key: str, bars: Bars
    ):
        self.config, self.inputs, self.subject = config, inputs, subject
        self.job, self.key, self.bars = job, key, bars
        self.prompts = inputs.prompts.prompts
        self.scoring = Scoring(config, inputs, subject, job, key, bars)
        self.timings: dict[str, float] = {}

    def run(self) -> AuditResult:
        """Work through all phases and write the folder."""
        start = time.perf_counter()
        with self._timed("load"):
            facts = self.subject.facts(self.job.journal("model"), self.config.detection)
        with self._timed("controls"):
            calibration, caveat = self.scoring.calibrate(facts)
        with self._timed("detection"):
            measured = self.scoring.detect(facts, calibration)
        scores = measured.detection.scores
        flags = calibration.flags(scores).tolist()
        with self._timed("explanation"):
            explanations = explain_flagged(
                self.subject, self.config, self.prompts, scores.tolist(), flags,
                self.job.journal("explanations"), job_key=self.key, rows=facts.rows,
                bars=self.bars,
            )  # fmt: skip
        plan = plan_images(self.config, self.prompts, scores.tolist(), flags)
        with self._timed("generation"):
            self._generate(plan)
            maps = draw_maps(explanations, plan, self.job)
        with self._timed("similarity"):
            flagged = {index for index, flag in enumerate(flags) if flag}
            comparison = compare(
                self.config, self.inputs, plan, flagged, self.job, self.key, self.bars
            )
        words = {index: to_words(values) for index, values in explanations.items()}
        entries = self._entries(measured, calibration, words, maps, plan, comparison)
        caveats = [*facts.caveats, *filter(None, [caveat]), *comparison.caveats]
        self.timings["total"] = time.perf_counter() - start
        summary = summarize(
            self.config, self.inputs, facts.info, calibration, entries,
            caveats=caveats, similarity=comparison.summary, timings=self.timings,
        )  # fmt: skip
        result = AuditResult(
            config=self.config, model=facts.info, calibration=calibration, entries=entries,
            summary=summary, folder=self.job.folder,
        )  # fmt: skip
        write_folder(result)
        return result

    def _generate(self, plan: list[Sampled]) -> None:
        missing = unfinished(plan, self.job, self.key)
        total, left = (sum(len(s.seeds) for s in part) for part in (plan, missing))
        bar = self.bars("images", total, total - left, "image")
        try:
            generate_images(self.subject, self.config, missing, self.job, self.key, bar)
        finally:
            bar.close()

    def _entries(
        self,
        measured: Measured,
        calibration: Calibration,
        words: dict[int, WordSignificance],
        maps: dict[int, str],
        plan: list[Sampled],
        comparison: Comparison,
    ) -> tuple[AuditEntry, ...]:
        scores, images = measured.detection.scores, {s.index: s for s in plan}
        columns = zip(
            self.prompts, self.inputs.prompts.sources, self.inputs.groups, measured.cuts,
            scores.tolist(), measured.detection.scores_per_element.tolist(),
            measured.detection.traces.tolist(), calibration.p_values(scores).tolist(),
            calibration.adjusted(scores).tolist(), calibration.flags(scores).tolist(), strict=True,
        )  # fmt: skip
        return tuple(
            AuditEntry(
                index=index, prompt=prompt, sources=sources, count=len(sources), cut=cut,
                group=group, score=score, score_per_element=per_element,
                trace=tuple(tuple(None if x != x else x for x in row) for row in trace),
                p_value=p_value, q_value=q_value, memorized=memorized,
                explanation=words.get(index),
                images=tuple(
                    GeneratedImage(path=sampled.path(seed), seed=seed,
                                   nearest=comparison.nearest.get(sampled.path(seed)))
                    for sampled in [images[index]] for seed in sampled.seeds
                ) if index in images else (),
                map=maps.get(index),
            )
            for index, (prompt, sources, group, cut, score, per_element, trace, p_value, q_value,
                        memorized) in enumerate(columns)
        )  # fmt: skip

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings[name] = time.perf_counter() - start


def write_folder(result: AuditResult) -> None:
    """Write results.jsonl, summary.json, calibration.json and the report, each whole or not."""
    from .report import render_report

    folder = result.folder
    write_text(folder / "results.jsonl", "".join(e.to_json() + "\n" for e in result.entries))
    result.calibration.save(folder / "calibration.json")
    write_text(folder / "report.html", render_report(result, folder))
    write_text(folder / "summary.json", dumps(result.summary, indent=1) + "\n")
