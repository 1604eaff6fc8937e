"""Explain the flagged prompts, each stored as soon as it is finished."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...shared.drawing.heatmap import overlay_map
from ...shared.files.storage import Journal, replace_atomically
from ...shared.words.explanation import Explanation, explain
from ..common.job import Job, content_key
from ..common.measure import Bars
from ..common.subject import Subject
from .config import AuditConfig
from .generation import Sampled
from .result import OccludedWord, WordSignificance


def explain_flagged(
    subject: Subject,
    config: AuditConfig,
    prompts: Sequence[str],
    scores: Sequence[float],
    flags: Sequence[bool],
    journal: Journal,
    *,
    job_key: str,
    rows: int,
    bars: Bars,
) -> dict[int, dict[str, Any]]:
    """Return the stored explanations of the flagged prompts, by the prompt's index.

    Highest scores first, as many as the config allows; seeds and steps are those of the score, so
    that the score an occlusion starts from is the one in the table. `rows` is the batch size.
    """
    detection = replace(config.detection, batch_size=rows)
    order = sorted((i for i in range(len(prompts)) if flags[i]), key=lambda i: (-scores[i], i))
    chosen = order if config.explain is None else order[: config.explain]
    keys = {index: content_key(job_key, prompts[index]) for index in chosen}
    missing = [index for index in chosen if keys[index] not in journal]
    bar = bars("explanation", len(chosen), len(chosen) - len(missing), "prompt")
    try:
        for index in missing:
            explanation = explain(subject.denoiser, prompts[index], detection)
            journal.put(keys[index], to_values(explanation))
            bar.update(1)
    finally:
        bar.close()
    return {index: journal.get(key) for index, key in keys.items()}


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


def draw_maps(
    explanations: dict[int, dict[str, Any]], plan: Sequence[Sampled], job: Job
) -> dict[int, str]:
    """Lay each score-difference map over the prompt's first image; return the paths by index.

    The map is of the first measured seed, which is also the first image's.
    """
    from PIL import Image

    paths = {}
    for sampled in plan:
        if sampled.index not in explanations:
            continue
        name = f"images/{sampled.index:05d}-map.png"
        if not (job.folder / name).is_file():
            with Image.open(job.folder / sampled.path(sampled.seeds[0])) as image:
                drawn = overlay_map(image, explanations[sampled.index]["map"])
            with replace_atomically(job.folder / name) as part:
                drawn.save(part, format="PNG")
        paths[sampled.index] = name
    return paths
