"""Run an audit: score, explain, sample, compare, write; killed anywhere, it continues.

    result = run_audit(AuditConfig(model="models/mine", prompts=(Path("captions.txt"),)))

Everything that takes time is stored in ``<output>/journal`` as soon as it is finished, keyed by its
content. The files of the result are then written from the journals alone, so that an audit that was
stopped and continued ends with the same bytes as one that was not.
"""

from collections.abc import Mapping, Sequence

from ...shared.dependencies import check_installed
from ...shared.files.storage import write_text
from ..common.measure import Bars, silent
from ..common.result import dumps
from .comparison import Comparison, compare
from .config import AuditConfig
from .explain import explain_flagged, to_words
from .families import relate
from .images import Sampled, draw_images, draw_maps, plan_images
from .inputs import Inputs, read_inputs
from .redrawing import redraw
from .report import render_report
from .result import (
    AuditEntry,
    AuditResult,
    GeneratedImage,
    NearPrompt,
    WordSignificance,
    summarize,
)
from .work import Scored, open_work, score, verdicts


def run_audit(config: AuditConfig, bars: Bars = silent) -> AuditResult:
    """Audit a model and write report, results and images into `config.output`.

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
    # Before hours of work, not after.
    check_installed(("jinja2", "PIL", "scipy"), purpose="An audit", extra="reports")
    inputs = read_inputs(config)
    with open_work(config, inputs, bars) as work:
        with work.timed("total"):
            scored = score(work)
            with work.timed("families"):
                related = relate(
                    work.subject, scored.facts, inputs.prompts.prompts,
                    {index: scored.scores[index] for index in scored.flagged}, config.detection,
                    work.job.journal("families"), judge=scored.calibration.judge,
                    job_key=work.job.key, folder=work.job.folder / "journal" / "families",
                    bars=bars,
                )  # fmt: skip
            with work.timed("explanation"):
                explanations = explain_flagged(work, scored)
            plan = plan_images(config, inputs.prompts.prompts, scored)
            with work.timed("generation"):
                draw_images(work, plan)
                maps = draw_maps(work.job.folder, plan, explanations)
            with work.timed("similarity"):
                comparison = compare(work, scored, plan)
            with work.timed("redrawing"):
                redrawn = redraw(work, plan, explanations, comparison)
            words = {index: to_words(values, redrawn.get(index, ()))
                     for index, values in explanations.items()}  # fmt: skip
            near = related.near(comparison.own_copied(plan))
            entries = _entries(inputs, scored, near, words, plan, maps, comparison)
        result = AuditResult(
            config=config, model=scored.facts.info, calibration=scored.calibration,
            entries=entries, folder=work.job.folder,
            summary=summarize(
                config, inputs, scored.facts.info, scored.calibration.judge, entries,
                caveats=(*scored.caveats, *related.caveats, *comparison.caveats),
                similarity=comparison.summary, timings=work.timings,
            ),
        )  # fmt: skip
        _write(result)
    return result


def _entries(
    inputs: Inputs,
    scored: Scored,
    near: Mapping[int, NearPrompt],
    words: Mapping[int, WordSignificance],
    plan: Sequence[Sampled],
    maps: Mapping[int, str],
    comparison: Comparison,
) -> tuple[AuditEntry, ...]:
    images = {
        sampled.index: tuple(
            GeneratedImage(path=path, seed=seed, nearest=comparison.nearest.get(path))
            for seed, path in sampled.paths.items()
        )
        for sampled in plan
    }
    rows = verdicts(scored.measured, scored.calibration.judge)
    columns = zip(rows, inputs.prompts.sources, inputs.groups, strict=True)
    return tuple(
        AuditEntry(
            **row | {"trace": tuple(map(tuple, row["trace"]))},
            index=index, sources=sources, count=len(sources), group=group,
            near=near.get(index), explanation=words.get(index),
            images=images.get(index, ()), map=maps.get(index),
        )
        for index, (row, sources, group) in enumerate(columns)
    )  # fmt: skip


def _write(result: AuditResult) -> None:
    """Write results.jsonl, summary.json, calibration.json and the report, each whole or not."""
    folder = result.folder
    write_text(folder / "results.jsonl", "".join(e.to_json() + "\n" for e in result.entries))
    result.calibration.save(folder / "calibration.json")
    write_text(folder / "report.html", render_report(result, folder))
    write_text(folder / "summary.json", dumps(result.summary, indent=1) + "\n")
