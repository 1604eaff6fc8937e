"""Run an audit: score, explain, sample, compare, write; killed anywhere, it continues.

    result = run_audit(AuditConfig(model="models/mine", prompts=(Path("captions.txt"),)))

A page of what is known is written as soon as all prompts are scored, again when the strongest have
words and images, and whenever the work is interrupted. Everything that takes time is stored in
``<output>/journal`` as soon as it is finished, keyed by its content. The files of the result are
then written from the journals alone, so that an audit that was stopped and continued ends with the
same bytes as one that was not.
"""

from collections.abc import Callable
from functools import cache

from ...shared.dependencies import check_installed
from ...shared.files.storage import write_text
from ..common.measure import Bars, silent
from ..common.result import dumps
from .comparison import compare, comparer_of
from .config import AuditConfig
from .explain import explain_flagged
from .families import relate
from .images import all_exist, at_once, draw, first_images, plan_images, shots_of
from .inputs import read_inputs
from .progress import PAGE, Progress, scored_so_far
from .redrawing import redraw
from .report import render_report
from .result import AuditResult
from .work import Work, complete_scores, first_scores, open_work

OnPage = Callable[[AuditResult], object]
"""Takes what a page shows that was written while work is open."""


def run_audit(
    config: AuditConfig, bars: Bars = silent, on_page: OnPage = lambda result: None
) -> AuditResult:
    """Audit a model and write report, results and images into `config.output`.

    Args:
        config: What to audit and where to write.
        bars: Makes the progress bars.
        on_page: Called when a page was written that says what is open: at the first verdicts, and
            when the work is interrupted.

    Raises:
        ModelError: The model or LoRA cannot be used.
        PromptError: Prompts or controls cannot be read.
        FolderTaken: The output folder holds something else.
        StorageError: Nothing can be written; what was finished is kept.
        CalibrationMismatch: The given calibration is for another model or setting.
        NotEnoughControls: The controls cannot support the false-positive rate.
    """
    # Before hours of work, not after.
    check_installed(("jinja2", "PIL", "scipy"), purpose="An audit", extra="reports")
    inputs = read_inputs(config)
    with open_work(config, inputs, bars) as work:
        progress: Progress | None = None
        try:
            with work.timed("total"):
                progress = _first(work)
                # A continued job has a page that knows as much.
                if progress.scored.pace or not (work.job.folder / PAGE).is_file():
                    on_page(progress.write_page())
                _rest(progress)
        except KeyboardInterrupt:
            if progress := progress or scored_so_far(work):
                on_page(progress.write_page())
            raise
        result = progress.result(finished=True)
        _write(result)
    return result


def _first(work: Work) -> Progress:
    """Return the verdicts."""
    scored, config = first_scores(work), work.config
    with work.timed("families"):
        related = relate(
            work.subject, scored.facts, work.inputs.prompts.prompts,
            {index: scored.scores[index] for index in scored.flagged}, config.detection,
            work.job.journal("families"), judge=scored.calibration.judge,
            job_key=work.job.key, folder=work.job.folder / "journal" / "families",
            bars=work.bars,
        )  # fmt: skip
    plan = plan_images(config, work.inputs.prompts.prompts, scored)
    return Progress(work=work, scored=scored, related=related, plan=plan)


def _rest(progress: Progress) -> None:
    """Explain, draw and compare, the strongest prompts first, and measure what decides nothing."""
    work, scored, plan = progress.work, progress.scored, progress.plan
    together, shots, comparer = (
        at_once(scored.facts),
        shots_of(plan),
        cache(lambda: comparer_of(work)),
    )
    with work.timed("explanation"):
        explain_flagged(work, scored, work.config.flagged_pictured)
    with work.timed("generation"):
        draw(work, shots[: len(plan)], together, "images")
    with work.timed("similarity"):
        progress.comparison = compare(work, scored, first_images(plan), comparer)
    if not all_exist(work.job.folder, (shot.path for shot in shots)):
        progress.write_page()
    with work.timed("generation"):
        draw(work, shots[len(plan) :], together, "further images")
    with work.timed("similarity"):
        progress.comparison = compare(work, scored, plan, comparer)
    with work.timed("explanation"):
        explanations = explain_flagged(work, scored)
    with work.timed("redrawing"):
        progress.redrawn = redraw(work, plan, explanations, progress.comparison, comparer, together)
    progress.scored = complete_scores(work, scored)


def _write(result: AuditResult) -> None:
    """Write results.jsonl, summary.json, calibration.json and the report, each whole or not."""
    folder = result.folder
    write_text(folder / "results.jsonl", "".join(e.to_json() + "\n" for e in result.entries))
    result.calibration.save(folder / "calibration.json")
    write_text(folder / PAGE, render_report(result, folder))
    write_text(folder / "summary.json", dumps(result.summary, indent=1) + "\n")
