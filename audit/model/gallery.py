"""The cards of a report: one prompt with its words, its pictures and their nearest neighbours."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...shared.drawing.heatmap import prompt_heatmap_html
from ...shared.drawing.score_charts import score_traces
from ..common.pages import FOLD, Embedder, embedded_chart, safe
from ..common.wording import number

if TYPE_CHECKING:
    from .result import AuditEntry, AuditResult, GeneratedImage

CARDS = 60
"""Flagged prompts that are shown in full, highest score first."""
WORDS = 16
"""Words whose numbers are listed, strongest first."""


def gallery(result: "AuditResult", folder: Path) -> dict[str, Any]:
    """Return the cards of flagged prompts and of the sample of the others."""
    flagged, embed = result.flagged, Embedder(folder)
    threshold = result.calibration.threshold
    cards = [_card(entry, threshold, embed) for entry in flagged[:CARDS]]
    others = [entry for entry in result.entries if entry.images and not entry.memorized]
    return {
        "cards": cards,
        "cards_left": len(flagged) - len(cards),
        "samples": [_card(entry, threshold, embed) for entry in others],
        "truth_known": any(image.nearest for entry in flagged for image in entry.images),
    }


def _trace(entry: "AuditEntry", threshold: float) -> dict[str, Any] | None:
    """Return the score per step as a chart, None when only one step was measured."""
    if len(entry.trace[0]) < 2:
        return None
    rows = [[math.nan if v is None else v for v in seed] for seed in entry.trace]
    return embedded_chart(
        lambda theme, width: score_traces(rows, threshold=threshold, theme=theme, width=width),
        desk=800,
    )


def _card(entry: "AuditEntry", threshold: float, embed: Embedder) -> dict[str, Any]:
    """Return what one card shows; text still unescaped, except the coloured prompt."""
    known, copied = entry.explanation, [i.nearest.copied for i in entry.images if i.nearest]
    hits, words = sum(bool(value) for value in copied), []
    if known:
        pairs = zip(known.words, known.significance, strict=True)
        words = sorted(pairs, key=lambda pair: -pair[1])[:WORDS]
    return {
        "index": entry.index,
        "prompt": entry.prompt,
        "heatmap": known and safe(
            prompt_heatmap_html(known.words, known.significance, style=False)
        ),
        "long": len(entry.prompt) > FOLD,
        "score": entry.score,
        "ratio": number(entry.score / threshold, 2) if entry.memorized and threshold > 0 else "",
        "p_value": entry.p_value,
        "q_value": entry.q_value,
        "group": entry.group,
        "copies": f"{hits} of {len(copied)} {'is a copy' if hits == 1 else 'are copies'}"
        if hits else "",
        "suggestions": known.suggestions if known else (),
        "count": entry.count,
        "cut": entry.cut,
        "tiles": _tiles(entry, embed),
        "words": words,
        "trace": _trace(entry, threshold) if entry.memorized else None,
    }  # fmt: skip


def _tiles(entry: "AuditEntry", embed: Embedder) -> list[dict[str, Any]]:
    """Return generated pictures, each group before its nearest training picture, and the map."""
    groups: dict[tuple[str | None, str], list[GeneratedImage]] = {}
    for image in entry.images:
        key = (image.nearest.path, image.nearest.caption) if image.nearest else (None, "")
        groups.setdefault(key, []).append(image)
    tiles = []
    for images in groups.values():
        for image in images:
            tiles.append(_generated_tile(image, embed))
        if nearest := images[0].nearest:
            whose = "its own" if nearest.is_own else "nearest"
            tiles.append({
                "uri": embed(nearest.path), "truth": True,
                "alt": f"Training picture: {nearest.caption}",
                "title": f"{whose} training picture",
                "text": nearest.caption,
            })  # fmt: skip
    if entry.map:
        tiles.append({
            "uri": embed(entry.map), "truth": False, "title": "where the text pulls",
            "alt": "Map of the score difference over the first picture", "text": "",
        })  # fmt: skip
    return tiles


def _generated_tile(image: "GeneratedImage", embed: Embedder) -> dict[str, Any]:
    text, nearest = f"seed {image.seed}", image.nearest
    if nearest:
        text += f", similarity {number(nearest.similarity, 2)}"
        text += ": a copy" if nearest.copied else ""
    return {"uri": embed(image.path), "truth": False, "title": "made by the model", "text": text,
            "alt": f"Picture made by the model from this prompt, seed {image.seed}"}  # fmt: skip
