"""Sample prompts as they are and mitigated, side by side: the work of `unmemorize mitigate`.

    result = run_mitigation(MitigationConfig(audit=AuditConfig(model="models/mine"),
                                             texts=("a caption",), methods=("delayed_guidance",)))

Like an audit it keeps a journal: killed anywhere, the same call continues.
"""

import logging
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from ... import demo
from ...shared.files.storage import write_text
from ...shared.mitigation import DEFAULT, METHODS, NearestNeighbour, make_method
from ...shared.mitigation.method import Method
from ...shared.sampling.guard import guard
from ...shared.score.calibration import Calibration
from ...shared.words.advice import advise
from ..common.job import content_key
from ..common.measure import Bars, complete, silent
from ..common.result import dumps
from .comparison import Comparer, Known
from .images import all_exist, draw_others, sample
from .inputs import read_inputs
from .mitigation_page import render_mitigation, write_sheets
from .mitigation_result import (
    UNMITIGATED,
    MitigationConfig,
    MitigationEntry,
    MitigationResult,
    Probed,
    Rewording,
    Search,
    Trial,
    summarize,
)
from .mitigation_training import has_training_images, keep_away, known_training, read_training
from .residual_probe import probe_prompt
from .result import GeneratedImage, NearestImage
from .work import Scored, Work, open_work, score

DEMO_PROMPTS = {"verbatim": 4, "template": 2, "learnt": 2}
"""Captions per group that the demo shows when no prompt is named."""
NEEDS_TWO = (
    "The probe tells a copy by the distances of training images to each other: it needs two, and "
    "knows one. Give --training a folder with more of them, or leave --probe out."
)
logger = logging.getLogger(__name__)

SHOWN_EDITS = 6
"""Edits of a prompt that are kept, best first."""


def run_mitigation(config: MitigationConfig, bars: Bars = silent) -> MitigationResult:
    """Sample prompts with and without each method and write images, scores and a page.

    Args:
        config: What to sample and where to write.
        bars: Makes the progress bars.

    Raises:
        ValueError: A method or gate of that name does not exist, or no prompts were named.
        PromptError: Prompts or controls cannot be read.
        ModelError: The model or LoRA cannot be used.
        FolderTaken: The output folder holds something else.
        StorageError: Nothing can be written; what was finished is kept.
        CalibrationMismatch: The given calibration is for another model or setting.
        NotEnoughControls: The controls cannot support the false-positive rate.
    """
    inputs = read_inputs(config.audit, config.texts, DEMO_PROMPTS)
    training = has_training_images(config, inputs)
    if config.probe and not training:
        raise ValueError(
            "The probe searches for known training images, and none are known: give their folder "
            "with --training, or leave --probe out."
        )
    named = (
        None
        if config.audit.model in demo.BUNDLED and config.training is None
        else (read_training(config.training) if config.training else inputs.prompts)
    )
    if config.probe and named and len(set().union(*map(set, named.images))) < 2:
        raise ValueError(NEEDS_TWO)
    config = replace(config, methods=chosen_methods(config.methods, training=training))
    deciding = {name: getattr(config, name) for name in ("gate", "images", "advise", "probe")}
    more = {"work": "mitigation", "methods": list(config.methods), **deciding}
    if config.training is not None:
        read = read_training(config.training)
        more["training"] = [
            [caption, str(path), path.stat().st_size]
            for caption, paths in zip(read.prompts, read.images, strict=True)
            for path in paths
        ]
    with open_work(config.audit, inputs, bars, more) as work:
        scored = score(work)
        known = known_training(config, inputs.prompts, work.bars)
        trials = _sample(work, config, scored.calibration, known)
        comparer = None
        if known is not None and len(known.thumbnails) > 1:
            comparer = Comparer(known, work.job.folder, work.bars)
        if config.probe and comparer is None:
            raise ValueError(NEEDS_TWO)  # of those named, fewer can be read
        if known is not None and comparer is None:
            logger.warning("Copies are not looked for: it takes two training images, one is known.")
        others, told = _others(work, trials) if comparer else ([], [])
        trials = _with_nearest(inputs.prompts.prompts, trials, comparer, others)
        rewordings = _reword(work, scored) if config.advise else {}
        probed = _probe(work, config, scored, comparer, others) if config.probe and comparer else {}
        entries = tuple(
            MitigationEntry(
                index=index, prompt=prompt, score=scored.scores[index],
                memorized=scored.flags[index], trials=trials[index],
                rewordings=rewordings.get(index, ()), residual=probed.get(index),
            )
            for index, prompt in enumerate(inputs.prompts.prompts)
        )  # fmt: skip
        result = MitigationResult(
            config=config, calibration=scored.calibration, entries=entries,
            summary=summarize(config, scored, entries, told, len(known.captions) if known else 0),
            folder=work.job.folder,
        )  # fmt: skip
        _write(result)
    return result


def chosen_methods(names: Sequence[str], *, training: bool = False) -> tuple[str, ...]:
    """Return the methods to compare: the default for none, every possible one for "all".

    Args:
        names: Of `METHODS`, or "all".
        training: Training images are known, which `neighbour` needs.

    Raises:
        ValueError: There is no method of that name, or no training images for it.
    """
    if "all" in names:
        return tuple(name for name in METHODS if training or name != NearestNeighbour.name)
    for name in names:
        if name != NearestNeighbour.name:
            make_method(name)
        elif not training:
            raise ValueError(
                f"The method {name!r} keeps away from training images, and none are known: give "
                "their folder with --training."
            )
    return tuple(dict.fromkeys(names)) or (DEFAULT,)


def _sample(
    work: Work, config: MitigationConfig, calibration: Calibration, known: Known | None
) -> list[tuple[Trial, ...]]:
    """Sample every prompt with every method; each trial is stored as soon as it is finished."""
    prompts, methods = work.inputs.prompts.prompts, (UNMITIGATED, *config.methods)

    @cache
    def made(name: str) -> Method:
        if name != NearestNeighbour.name:
            return make_method(name)
        if known is None:
            raise ValueError(f"None of the training images for {name!r} can be read.")
        return keep_away(known, work.subject.denoiser)

    def trial(place: tuple[int, str]) -> dict[str, Any]:
        index, method = place
        acting = None if method == UNMITIGATED else made(method)
        return asdict(_trial(work, config, index, acting, calibration))

    stored = complete(
        work.job.journal("trials"),
        {(index, method): content_key(work.job.key, prompt, method)
         for index, prompt in enumerate(prompts) for method in methods},
        trial, bars=work.bars, phase="images", unit="image", size=lambda place: config.images,
        whole=lambda v: all_exist(work.job.folder, (image["path"] for image in v["images"])),
    )  # fmt: skip
    trials = {
        place: Trial(**v | {"images": tuple(GeneratedImage(**image) for image in v["images"])})
        for place, v in stored.items()
    }
    return [tuple(trials[index, m] for m in methods) for index in range(len(prompts))]


def _trial(
    work: Work, config: MitigationConfig, index: int, acting: Method | None,
    calibration: Calibration,
) -> Trial:  # fmt: skip
    denoiser = work.subject.denoiser
    method, sampling = UNMITIGATED, nullcontext()
    if acting is not None:
        method = acting.name
        sampling = guard(
            denoiser.pipeline, method=acting, calibration=calibration,
            gate=config.gate, force=work.config.force,
        )  # fmt: skip
    paths = {seed: f"images/{index:05d}-{method}-seed{seed}.png" for seed in range(config.images)}
    start = time.perf_counter()
    with sampling as record:
        prompt = work.inputs.prompts.prompts[index]
        sample(denoiser, work.config, prompt, work.job.folder, paths)
    seconds = (time.perf_counter() - start) / config.images
    guarded = record.runs[-1].images if record else ()
    after = [image.score_after for image in guarded if image.score_after is not None]
    return Trial(
        method=method, acted=any(image.fired for image in guarded), seconds=seconds,
        change="; ".join(dict.fromkeys(image.change for image in guarded if image.change)),
        score_after=statistics.mean(after) if after else None,
        images=tuple(GeneratedImage(path=path, seed=seed, nearest=None)
                     for seed, path in paths.items()),
    )  # fmt: skip


def _others(
    work: Work, trials: Sequence[tuple[Trial, ...]]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return pairs of prompt and unmitigated image, enough to tell copies by, and what to tell."""
    prompts = work.inputs.prompts.prompts
    more, told = draw_others(work, prompts)
    drawn = [(prompt, image.path) for prompt, tried in zip(prompts, trials, strict=True)
             for image in tried[0].images]  # fmt: skip
    return drawn + more, told


def _with_nearest(
    prompts: Sequence[str], trials: Sequence[tuple[Trial, ...]], comparer: Comparer | None,
    others: Sequence[tuple[str, str]],
) -> list[tuple[Trial, ...]]:  # fmt: skip
    """Return the trials with the training image nearest to each image, where those are known.

    A mitigated image is judged by unmitigated ones, so that no method moves the limits.
    """
    if comparer is None:
        return list(trials)
    nearest: dict[str, NearestImage] = {}
    for way in zip(*trials, strict=True):
        pairs = [(prompt, image.path) for prompt, trial in zip(prompts, way, strict=True)
                 for image in trial.images]  # fmt: skip
        more = [pair for pair in others if pair not in pairs]
        nearest |= comparer.nearest(pairs, comparer.judge([*pairs, *more]))
    return [
        tuple(replace(trial, images=tuple(replace(image, nearest=nearest[image.path])
                                          for image in trial.images)) for trial in tried)
        for tried in trials
    ]  # fmt: skip


def _reword(work: Work, scored: Scored) -> dict[int, tuple[Rewording, ...]]:
    """Return verified edits of the prompts above the threshold."""
    prompts = work.inputs.prompts.prompts

    def reword(index: int) -> list[dict[str, Any]]:
        judge, config = scored.calibration.judge, work.config.detection
        if judge.basis:
            config = replace(config, seeds=tuple(judge.settings["seeds"]))
        advice = advise(
            work.subject.denoiser, prompts[index], judge.threshold, config, basis=judge.basis
        )
        best = sorted(advice.candidates, key=lambda e: not e.under_threshold)[:SHOWN_EDITS]
        return [
            {"prompt": e.prompt, "edit": e.kind, "score": e.score_after,
             "under_threshold": e.under_threshold}
            for e in best
        ]  # fmt: skip

    stored = complete(
        work.job.journal("advice"), _keys(work, scored), reword,
        bars=work.bars, phase="advice", unit="prompt",
    )  # fmt: skip
    return {index: tuple(Rewording(**edit) for edit in edits) for index, edits in stored.items()}


def _probe(
    work: Work, config: MitigationConfig, scored: Scored, comparer: Comparer,
    others: Sequence[tuple[str, str]],
) -> dict[int, Probed]:  # fmt: skip
    """Return the residual probes of prompts above the threshold whose training image is known."""
    prompts = work.inputs.prompts.prompts

    def probe(index: int) -> dict[str, Any] | None:
        probed = probe_prompt(
            work.subject.denoiser, comparer, work.config, prompts[index],
            range(config.images), f"{index:05d}", others,
        )  # fmt: skip
        return probed and asdict(probed)

    stored = complete(
        work.job.journal("residual"), _keys(work, scored), probe,
        bars=work.bars, phase="residual probe", unit="prompt",
    )  # fmt: skip
    return {
        index: Probed(training=_search(probed["training"]),
                      mirror=probed["mirror"] and _search(probed["mirror"]))
        for index, probed in stored.items() if probed
    }  # fmt: skip


def _search(values: dict[str, Any]) -> Search:
    lists = {name: tuple(values[name]) for name in ("images", "copied")}
    return Search(**values | lists)


def _keys(work: Work, scored: Scored) -> dict[int, str]:
    """Return the journal's keys of the prompts above the threshold."""
    prompts = work.inputs.prompts.prompts
    return {i: content_key(work.job.key, prompts[i]) for i in sorted(scored.flagged)}


def _write(result: MitigationResult) -> None:
    """Write results.jsonl, summary.json, the contact sheets and the page, each whole or not."""
    folder = result.folder
    write_text(folder / "results.jsonl", "".join(e.to_json() + "\n" for e in result.entries))
    result.calibration.save(folder / "calibration.json")
    write_sheets(result, folder)
    write_text(folder / "mitigation.html", render_mitigation(result, folder))
    write_text(folder / "summary.json", dumps(result.summary, indent=1) + "\n")
