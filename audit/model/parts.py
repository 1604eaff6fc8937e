"""The parts of an audit on their own: scores, explanations, a calibration."""

import glob
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...shared.drawing.heatmap import prompt_heatmap_html, prompt_heatmap_png
from ...shared.files.images import save_png
from ...shared.files.storage import Journal, StorageError, beside, make_folder, write_text
from ...shared.score.calibration import Calibration
from ...shared.score.clips import DIMENSIONS
from ...shared.score.collapse import SecondStage
from ...shared.score.config import DetectionConfig
from ...shared.score.control_basis import require_direction
from ...shared.score.rates import require_controls
from ...shared.words.explanation import Method, explain
from ..common.controls import Controls
from ..common.job import content_key
from ..common.measure import Bars, measure_judged, with_magnitudes
from ..common.result import dumps, finite, versions
from ..common.subject import Subject
from .clips import NO_CLIP_CONTROLS, clip_verdicts
from .config import measured_score
from .explain import to_values
from .families import relate
from .inputs import read_controls, read_named
from .result import NearPrompt
from .work import verdicts


def score_prompts(
    subject: Subject,
    *,
    files: Sequence[Path],
    texts: Sequence[str],
    config: DetectionConfig,
    calibration: Path | None,
    force: bool,
    sequential: bool,
    collapse: bool,
    output: Path | None,
    bars: Bars,
) -> list[dict[str, Any]]:
    """Return one row a prompt; p-values and verdicts are None without a calibration.

    Args:
        subject: The model.
        files: With prompts.
        texts: Further prompts.
        config: What to measure.
        calibration: Gives the verdicts.
        force: Use it although it was made for something else.
        sequential: Draw only the seeds a verdict needs; needs a calibration.
        collapse: Sample suspicious prompts as well; needs a calibration with a second stage.
        output: JSON lines; work is kept beside it until it is finished.
        bars: Makes the progress bar.
    """
    prompts = read_named(files, texts, is_demo=subject.is_demo).prompts
    if sequential and calibration is None:
        raise ValueError("Stopping early needs a threshold: give --calibration FILE, made by "
                         "`unmemorize calibrate`, or leave --fast out.")  # fmt: skip
    if collapse and calibration is None:
        raise ValueError("Which prompts are suspicious follows from controls: give --calibration "
                         "FILE, made by `unmemorize calibrate --collapse`, or leave --collapse "
                         "out.")  # fmt: skip
    given = Calibration.load(calibration) if calibration else None
    judge = given.judge if given else None
    if judge and collapse:
        judge.require_second()
    by = (given.to_values(), sequential, collapse) if given else None
    with _kept(subject, config, output, by) as (journal, key):
        facts = subject.facts(journal, config)
        caveat = judge.check(subject.fingerprint, facts.of(judge), force=force) if judge else ""
        measured = measure_judged(
            subject, facts, prompts, config, journal, judge=judge, sequential=sequential,
            collapse=collapse, job_key=key, bars=bars,
        )  # fmt: skip
        name = "residual" if judge and judge.basis else "magnitude"
        if name == "residual" or (sequential and len(facts.info.latent_shape) == DIMENSIONS):
            measured = with_magnitudes(measured, subject, facts, journal, job_key=key, bars=bars)
        rows = verdicts(measured, judge)
        parts = clip_verdicts(measured, given)
        clips: list[Any] = parts or [None] * len(rows)
        near: Mapping[int, NearPrompt] = {}
        if judge:
            scores = measured.detection.scores
            told = judge.unlike(scores), judge.coarse(scores, measured.sampled)
            caveat = " ".join(filter(None, (caveat, *told)))
            related = relate(
                subject, facts, prompts,
                {index: row["score"] for index, row in enumerate(rows) if row["memorized"]},
                config, journal, judge=judge, job_key=key,
                folder=journal.path.with_suffix(".families"), bars=bars,
            )  # fmt: skip
            near, caveat = related.near(), " ".join(filter(None, [caveat, *related.caveats]))
            if parts and given and given.motion is None:
                caveat = " ".join(filter(None, [caveat, NO_CLIP_CONTROLS]))
        more = {"measure": name, "caveat": caveat}
        rows = [
            row | {"near": asdict(near[index]) if index in near else None, "clip": clip} | more
            for index, (row, clip) in enumerate(zip(rows, clips, strict=True))
        ]
        if output:
            write_text(output, "".join(dumps(row) + "\n" for row in rows))
    return rows


def explain_prompts(
    subject: Subject,
    *,
    files: Sequence[Path],
    texts: Sequence[str],
    seeds: int,
    steps: int,
    method: Method,
    output: Path | None,
    bars: Bars,
) -> list[dict[str, Any]]:
    """Return which words carry each prompt's score; write coloured prompts into `output`."""
    if not files and not texts:
        raise ValueError("No prompts were named. Give --prompts FILE or --prompt TEXT.")
    prompts = read_named(files, texts, is_demo=subject.is_demo).prompts
    config = DetectionConfig(seeds=tuple(range(seeds)), steps=steps)
    rows = []
    with closing(bars("explanation", len(prompts), 0, "prompt")) as bar:
        for index, prompt in enumerate(prompts):
            values = to_values(explain(subject.denoiser, prompt, config, method=method))
            rows.append(finite({"prompt": prompt, **values}))
            if output:
                words, significance = values["words"], values["significance"]
                write_text(output / f"{index:05d}.html", prompt_heatmap_html(words, significance))
                save_png(prompt_heatmap_png(words, significance), output / f"{index:05d}.png")
            bar.update(1)
    return rows


def make_calibration(
    subject: Subject, *, controls: str, config: DetectionConfig, rate: float, score: str | None,
    collapse: bool, output: Path, bars: Bars,
) -> dict[str, Any]:  # fmt: skip
    """Score controls and write a calibration; return what it says."""
    score = measured_score(score, config)
    name, prompts = read_controls(controls, is_demo=subject.is_demo)
    require_controls(len(prompts), rate)
    if score == "residual":
        require_direction(len(prompts))
    if collapse:
        SecondStage.require_controls(len(prompts), rate)
    with _kept(subject, config, output, (prompts, rate)) as (journal, key):
        facts = subject.facts(journal, config)
        folder = journal.path.with_suffix(".controls")
        made = Controls(
            subject=subject, facts=facts, prompts=prompts, config=config, journal=journal,
            name=name, rate=rate, score=score, collapse=collapse, job_key=key, folder=folder,
            bars=bars,
        ).calibrate()  # fmt: skip
        made.save(output)
        shutil.rmtree(folder, ignore_errors=True)
    observed, made = made.observed, made.judge
    return {
        "score": made.settings.get("score", "magnitude"),
        "controls": made.controls,
        "n": len(made.control_scores),
        "threshold": made.threshold,
        "false_positive_rate": made.false_positive_rate,
        "interval": list(made.interval),
        "second_stage": made.second
        and {
            "suspicion": made.second.suspicion,
            "sampled": len(made.second.control_evidence),
            "threshold": made.second.threshold,
        },
        "observed_threshold": observed and observed.threshold,
        "model": made.model,
    }


@contextmanager
def _kept(
    subject: Subject, config: DetectionConfig, output: Path | None, more: Any = None
) -> Iterator[tuple[Journal, str]]:
    """Yield a journal beside `output` and the key of this work; it goes when the work is done."""
    key = content_key(
        subject.fingerprint, subject.device, subject.dtype, list(config.seeds), config.steps,
        config.schedule_steps, config.cond_scale, subject.resolution, subject.frames, versions(),
        more,
    )  # fmt: skip
    if output is None:
        with tempfile.TemporaryDirectory(prefix="unmemorize-") as folder:
            yield Journal(Path(folder) / "journal.jsonl"), key
        return
    try:
        make_folder(output.parent)
    except StorageError as error:  # the path that was typed, not the journal's beside it
        raise StorageError(f"{output} cannot be written: {error}") from error
    # The key in the name: work on another model or setting never meets this one's.
    path = beside(output, f".{key[:12]}.journal")
    for part in output.parent.glob(f"{glob.escape(beside(output, '').name)}*.part"):
        part.unlink(missing_ok=True)  # of a process that was killed
    yield Journal(path), key
    path.unlink(missing_ok=True)
