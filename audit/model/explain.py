"""Explain the flagged prompts, each stored as soon as its pass is finished."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from ...shared.words.explanation import Explanation, explain_each
from ..common.job import content_key
from ..common.result import finite
from .result import OccludedWord, RedrawnImage, WordSignificance
from .work import Scored, Work

ROWS_OF_A_PROMPT = 4
"""Forward rows a prompt takes, at least; so many prompts share passes that these are full."""


def explain_flagged(
    work: Work, scored: Scored, first: int | None = None
) -> dict[int, dict[str, Any]]:
    """Return the stored explanations of the flagged prompts, by the prompt's index.

    Highest scores first, as many as the config allows. Words are left out with the first of the
    score's seeds alone: more of them hardly rank words better.

    Args:
        work: Of the job.
        scored: The scores.
        first: So many, rounded up to full passes; None explains all.
    """
    prompts, detection = work.inputs.prompts.prompts, work.config.detection
    detection = replace(detection, seeds=detection.seeds[:1], batch_size=scored.facts.rows)
    wanted, journal = explained(work, scored), work.job.journal("explanations")
    size = max(1, scored.facts.rows // ROWS_OF_A_PROMPT)
    # Cut as if nothing was known: what stands in one pass with a prompt may move its last digits.
    parts = [wanted[start : start + size] for start in range(0, len(wanted), size)]
    parts = parts if first is None else parts[: -(-first // size)]
    keys = {index: content_key(work.job.key, prompts[index]) for part in parts for index in part}
    known = sum(key in journal for key in keys.values())
    with closing(work.bars("explanation", len(keys), known, "prompt")) as bar:
        for part in parts:
            missing = [index for index in part if keys[index] not in journal]
            if missing:
                found = explain_each(work.subject.denoiser, [prompts[i] for i in part], detection)
                values = dict(zip(part, map(to_values, found), strict=True))
                journal.put_all({keys[index]: values[index] for index in missing})
                bar.update(len(missing))
    return {index: journal.get(key) for index, key in keys.items()}


def explained(work: Work, scored: Scored) -> list[int]:
    """Return the flagged prompts that are explained, highest score first."""
    return scored.flagged[: work.config.explain]


def to_values(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as JSON values."""
    places = explanation.difference_map
    places = places.reshape(-1, *places.shape[-2:]).mean(0)  # frames of a video are laid together
    return {
        "method": explanation.method,
        "words": list(explanation.words),
        "significance": finite([float(value) for value in explanation.significance]),
        "occlusions": [
            {
                "word": o.word,
                "index": o.index,
                "score_before": o.score_before,
                "score_after": o.score_after,
            }
            for o in explanation.occlusions
        ],
        "suggestions": list(explanation.suggestions),
        "notes": list(explanation.notes),
        # Four digits: the map is only ever drawn.
        "map": [[float(f"{v:.4g}") for v in row] for row in places.tolist()],
    }


def to_words(values: dict[str, Any], redrawn: Sequence[RedrawnImage]) -> WordSignificance:
    """Return what results.jsonl says about a stored explanation, and the images without a word."""
    return WordSignificance(
        method=values["method"],
        words=tuple(values["words"]),
        significance=tuple(values["significance"]),
        occlusions=tuple(OccludedWord(**occlusion) for occlusion in values["occlusions"]),
        suggestions=tuple(values["suggestions"]),
        notes=tuple(values["notes"]),
        redrawn=tuple(redrawn),
    )
