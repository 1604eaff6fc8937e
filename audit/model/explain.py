"""Explain the flagged prompts, each stored as soon as it is finished."""

from dataclasses import replace
from typing import Any

from ...shared.words.explanation import Explanation, explain
from ..common.job import content_key
from ..common.measure import complete
from .result import OccludedWord, WordSignificance
from .work import Scored, Work


def explain_flagged(work: Work, scored: Scored) -> dict[int, dict[str, Any]]:
    """Return the stored explanations of the flagged prompts, by the prompt's index.

    Highest scores first, as many as the config allows; seeds, steps and batch size are those of the
    score, so that the score an occlusion starts from is the one in the table.
    """
    prompts = work.inputs.prompts.prompts
    detection = replace(work.config.detection, batch_size=scored.facts.rows)
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
        "words": list(explanation.words),
        "significance": [float(value) for value in explanation.significance],
        "occlusions": [
            {"word": o.word, "score_before": o.score_before, "score_after": o.score_after}
            for o in explanation.occlusions
        ],
        "suggestions": list(explanation.suggestions),
        # Four digits: the map is only ever drawn.
        "map": [[float(f"{v:.4g}") for v in row] for row in places.tolist()],
    }


def to_words(values: dict[str, Any]) -> WordSignificance:
    """Return what results.jsonl says about a stored explanation."""
    return WordSignificance(
        words=tuple(values["words"]),
        significance=tuple(values["significance"]),
        occlusions=tuple(OccludedWord(**occlusion) for occlusion in values["occlusions"]),
        suggestions=tuple(values["suggestions"]),
    )
