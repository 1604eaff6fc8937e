"""Explain the flagged prompts, each stored as soon as it is finished."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...shared.words.explanation import Explanation, explain
from ..common.job import content_key
from ..common.measure import complete
from ..common.result import finite
from .result import OccludedWord, RedrawnImage, WordSignificance
from .work import Scored, Work


def explain_flagged(work: Work, scored: Scored) -> dict[int, dict[str, Any]]:
    """Return the stored explanations of the flagged prompts, by the prompt's index.

    Highest scores first, as many as the config allows. Words are left out with the first of the
    score's seeds alone: more of them hardly rank words better.
    """
    prompts, detection = work.inputs.prompts.prompts, work.config.detection
    detection = replace(detection, seeds=detection.seeds[:1], batch_size=scored.facts.rows)
    return complete(
        work.job.journal("explanations"),
        {index: content_key(work.job.key, prompts[index])
         for index in scored.flagged[: work.config.explain]},
        lambda index: to_values(explain(work.subject.denoiser, prompts[index], detection)),
        bars=work.bars, phase="explanation", unit="prompt",
    )  # fmt: skip


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
