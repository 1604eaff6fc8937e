"""What an audit knows so far and what is still open: the page of a job that is not finished."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...shared.files.storage import write_text
from ...shared.wording import counted
from ..common.job import content_key
from ..common.measure import silent
from .comparison import Comparison
from .explain import explained, to_words
from .families import Related
from .images import Sampled, draw_maps, shots_of
from .redrawing import REDRAWN
from .report import render_report
from .result import (
    AuditEntry,
    AuditResult,
    GeneratedImage,
    RedrawnImage,
    summarize,
)
from .work import Scored, Work, first_scores, verdicts

PAGE = "report.html"


@dataclass(kw_only=True)
class Progress:
    """All that is known of one job; its phases fill it in, and a page of it can be written."""

    work: Work
    scored: Scored
    related: Related
    plan: Sequence[Sampled] = ()
    """The prompts that get images."""
    comparison: Comparison = field(default_factory=lambda: Comparison(nearest={}, summary=None))
    redrawn: dict[int, tuple[RedrawnImage, ...]] | None = None
    """None until they are drawn."""
    unscored: int = 0
    """Prompts that have no score yet and stand in no result."""

    def result(self, *, finished: bool) -> AuditResult:
        """Return everything that a page shows.

        Args:
            finished: Nothing is open; otherwise the result says what is.
        """
        work, scored, inputs = self.work, self.scored, self.work.inputs
        journal, prompts, folder = work.job.journal("explanations"), inputs.prompts, work.job.folder
        stored = {
            index: values
            for index in explained(work, scored)
            if (values := journal.get(content_key(work.job.key, prompts.prompts[index])))
        }
        words = {index: to_words(values, (self.redrawn or {}).get(index, ()))
                 for index, values in stored.items()}  # fmt: skip
        maps = draw_maps(folder, self.plan, stored)
        near = self.related.near(self.comparison.own_copied(self.plan))
        images = {
            sampled.index: tuple(
                GeneratedImage(path=path, seed=seed, nearest=self.comparison.nearest.get(path))
                for seed, path in sampled.paths.items() if (folder / path).is_file()
            )
            for sampled in self.plan
        }  # fmt: skip
        rows = verdicts(scored.measured, scored.calibration.judge)
        columns = zip(rows, prompts.sources, inputs.groups, strict=True)
        entries = tuple(
            AuditEntry(
                **row | {"trace": tuple(map(tuple, row["trace"]))},
                index=index, sources=sources, count=len(sources), group=group,
                near=near.get(index), explanation=words.get(index),
                images=images.get(index, ()), map=maps.get(index),
            )
            for index, (row, sources, group) in enumerate(columns)
        )  # fmt: skip
        return AuditResult(
            config=work.config, model=scored.facts.info, calibration=scored.calibration,
            entries=entries, folder=folder, open=() if finished else self._open(entries),
            summary=summarize(
                work.config, inputs, scored.facts.info, scored.calibration.judge, entries,
                caveats=(*scored.caveats, *self.related.caveats, *self.comparison.caveats),
                similarity=self.comparison.summary, timings=work.timings,
            ),
        )  # fmt: skip

    def write_page(self) -> AuditResult:
        """Write a page that says what is open, and return its result."""
        result = self.result(finished=False)
        write_text(result.folder / PAGE, render_report(result, result.folder))
        return result

    def _open(self, entries: Sequence[AuditEntry]) -> tuple[str, ...]:
        """Return sentences on what is not known yet, and about how long it will take."""
        if self.unscored:
            total = len(entries) + self.unscored
            return (f"{self.unscored} of {total} prompts have no score yet, and nothing is "
                    "explained or drawn.",)  # fmt: skip
        work, config, sentences, rows = self.work, self.work.config, [], 0
        wanted = explained(work, self.scored)
        if left := [index for index in wanted if entries[index].explanation is None]:
            flagged = counted(len(wanted), "flagged prompt", "flagged prompts")
            sentences.append(f"The words of {len(left)} of {flagged} were not left out yet.")
            rows += sum(len(entries[index].prompt.split()) + 1 for index in left)
        shots = shots_of(self.plan)
        drawn = [shot.path for shot in shots if (work.job.folder / shot.path).is_file()]
        if missing := len(shots) - len(drawn):
            sentences.append(f"{missing} of {counted(len(shots), 'image', 'images')} were not "
                             "drawn yet.")  # fmt: skip
        known = work.subject.is_demo or any(work.inputs.prompts.images)
        if known and any(path not in self.comparison.nearest for path in drawn):
            sentences.append("Not all images were compared with the training images yet.")
        copied = sum(entry.copied and entry.explanation is not None for entry in entries)
        again = REDRAWN * (copied if self.comparison.nearest else known * len(self.plan))
        if again and self.redrawn is None:
            sentences.append("Copies were not drawn without their strongest words yet.")
            missing += again
        rows += 2 * config.generation_steps * missing
        if any(math.isnan(entry.magnitude) for entry in entries):
            sentences.append("The magnitudes beside the scores were not measured yet.")
            rows += len(entries) + len(work.inputs.controls) * len(config.detection.seeds)
        if self.scored.pace and rows:
            seconds = max(10, round(rows * self.scored.pace, -1))
            about = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
            sentences.append(f"All that takes about {about}.")
        return tuple(sentences)


def scored_so_far(work: Work) -> Progress | None:
    """Return what is known of a job that was stopped while it scored prompts.

    None before the controls are done, or before any prompt is; and with a second stage, whose
    samples decide the verdicts.
    """
    folder, prompts = work.job.folder / "journal" / "controls", work.inputs.prompts
    calibrated = work.calibration is not None or (folder / "judge.json").is_file()
    journal = work.job.journal("detection")
    done = [index for index, prompt in enumerate(prompts.prompts)
            if content_key(work.job.key, prompt) in journal]  # fmt: skip
    if not calibrated or not done or work.config.collapse:
        return None

    def chosen(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[index] for index in done)

    part = replace(prompts, prompts=chosen(prompts.prompts), sources=chosen(prompts.sources),
                   images=chosen(prompts.images))  # fmt: skip
    inputs = replace(work.inputs, prompts=part, groups=chosen(work.inputs.groups))
    work = replace(work, inputs=inputs, bars=silent)
    scored = first_scores(work)
    scores = {index: scored.scores[index] for index in scored.flagged}
    return Progress(
        work=work, scored=scored, related=Related(prompts=part.prompts, scores=scores, cosines={}),
        unscored=len(prompts.prompts) - len(done),
    )  # fmt: skip
