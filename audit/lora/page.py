"""The page of a LoRA's audit: one HTML file that needs nothing else, safe to open and to send."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from ...shared.drawing.heatmap import heatmap_css, prompt_heatmap_html
from ..common.pages import TEMPLATES, embedded_chart, render_page, safe
from ..common.result import versions
from .grid import Cell, Grid, Row, gravity, load_matrix, make_grid, twins_of
from .page_images import LARGE, Thumbnails, epoch_chart
from .result import Clique, DuplicateGroup, ImageVerdict, LoraAudit

CARDS, SAMPLES = 24, 3
"""Flagged images that are shown side by side, and others for comparison."""
GROUPS, IN_GROUP = 12, 8
"""Groups of near-duplicates, and images of each."""
CLIQUES = 12
PROMPTS = 200
"""Prompts in the table of scores, largest difference first."""
SAYS = {
    "verbatim": "comes back", "template": "its layout comes back",
    "near": "closer than controls", "none": "not found",
}  # fmt: skip
ASKED = {
    "caption": "its caption", "trigger": "the trigger word", "paraphrase": "its caption, reworded",
    "empty": "no words", "attack": "the extraction attack",
}  # fmt: skip
ASKED_SHORT = ASKED | {"caption": "caption", "paraphrase": "caption, reworded",
                       "trigger": "trigger word", "attack": "attack"}  # fmt: skip
TITLES = {
    "duplicates": "Duplicates in the folder", "captions": "One caption on several images",
    "repeats": "Repeats", "epochs": "Epochs", "rank": "Rank",
}  # fmt: skip
COMMAND = "command"
"""The setting that is shown as the way to get the page again."""


def render_lora_page(audit: LoraAudit, *, include_images: bool) -> str:
    """Return the page as HTML, the same text for the same audit and pictures.

    Args:
        audit: What was found.
        include_images: Show training images as they are; otherwise a few pixels of them.

    Raises:
        ImportError: The extra `reports` is not installed.
        ValueError: similarity.npz does not fit the audit.
    """
    thumbnails = Thumbnails(audit, include_images=include_images)
    grid = make_grid(audit, load_matrix(audit))
    cliques = audit.attack.cliques if audit.attack else ()
    settings = dict(audit.settings)
    command = settings.pop(COMMAND, "")
    style = (TEMPLATES / "lora.css").read_text("utf-8")
    return render_page(
        "lora.html.j2",
        script="lora.js",
        style=heatmap_css() + style,
        audit=audit,
        include_images=include_images,
        says=SAYS,
        asked_short=ASKED_SHORT,
        titles=TITLES,
        facts=_facts(audit),
        version=versions()["unmemorize"],
        command=command,
        settings=list(settings.items()),
        **_matrix(grid, audit, thumbnails),
        **_cards(audit, thumbnails),
        duplicates=[_group(g, audit, thumbnails) for g in audit.duplicates[:GROUPS]],
        cliques=[_clique(c, audit, thumbnails) for c in cliques[:CLIQUES]],
        curve=_curve(audit),
        scores=_scores(audit),
    )


def _matrix(grid: Grid, audit: LoraAudit, thumbnails: Thumbnails) -> dict[str, Any]:
    """Return the table, and every picture that a click on it asks for."""
    shown = [
        {"number": n, "uri": thumbnails.generation(n), "blurred": thumbnails.blurs(n),
         "made": audit.generations[n]}
        for n in grid.shown()
    ]  # fmt: skip
    return {
        "grid": grid,
        "heads": [(title, len(list(group))) for title, group in
                  groupby(column.title for column in grid.columns)],
        "rows": [_row(row, audit, thumbnails) for row in grid.rows],
        "held_out": [_row(row, audit, thumbnails) for row in grid.held_out],
        "shown": shown,
    }  # fmt: skip


def _row(row: Row, audit: LoraAudit, thumbnails: Thumbnails) -> dict[str, Any]:
    image = audit.training.images[row.image]
    return {
        "number": row.image,
        "name": image.name,
        "file": image.name.rpartition("/")[2],
        "caption": image.caption,
        "uri": thumbnails.training(row.image),
        "verdict": row.verdict and row.verdict.verdict,
        "cells": [cell and _cell(cell) for cell in row.cells],
    }


def _cell(cell: Cell) -> dict[str, Any]:
    # .98 for 0.98: the columns stay narrow. Nothing but an equal picture reads 1.
    text = f"{min(cell.similarity, 0.994):.2f}" if cell.similarity < 1 else "1"
    return {"text": text.replace("0.", ".", 1), "level": cell.level, "mark": cell.mark,
            "generation": cell.generation, "twin": cell.twin}  # fmt: skip


def _cards(audit: LoraAudit, thumbnails: Thumbnails) -> dict[str, Any]:
    """Return flagged images, gravest first, and a few others for comparison."""
    rank = sorted(audit.verdicts, key=lambda v: (gravity(v), -v.similarity, v.image))
    flagged = [verdict for verdict in rank if verdict.verdict != "none"]
    others = rank[len(flagged) :][:SAMPLES]
    words, twins = dict(audit.words), twins_of(audit)

    def cards(verdicts: Iterable[ImageVerdict]) -> list[dict[str, Any]]:
        return [_card(verdict, audit, thumbnails, words, twins) for verdict in verdicts]

    return {
        "cards": cards(flagged[:CARDS]),
        "cards_left": max(len(flagged) - CARDS, 0),
        "samples": cards(others),
    }


def _card(
    verdict: ImageVerdict,
    audit: LoraAudit,
    thumbnails: Thumbnails,
    words: dict[str, tuple[tuple[str, float], ...]],
    twins: dict[int, int],
) -> dict[str, Any]:
    image = audit.training.images[verdict.image]
    tiles: list[dict[str, Any]] = [
        {"title": "training image", "text": image.name, "truth": True,
         "uri": thumbnails.training(verdict.image, LARGE)}
    ]  # fmt: skip
    if verdict.generation is not None:
        made = audit.generations[verdict.generation]
        tiles.append({"title": "with the LoRA", "truth": False,
                      "text": f"asked by {ASKED[made.asked]}, seed {made.seed}",
                      "uri": thumbnails.generation(verdict.generation, LARGE)})  # fmt: skip
        if (twin := twins.get(verdict.generation)) is not None:
            tiles.append({"title": "LoRA off", "text": "same words, same seed", "truth": False,
                          "uri": thumbnails.generation(twin, LARGE)})  # fmt: skip
    known = words.get(image.caption, ())
    return {
        "number": verdict.image, "verdict": verdict, "caption": image.caption,
        "repeats": image.repeats, "tiles": tiles,
        "heatmap": safe(
            prompt_heatmap_html(*map(list, zip(*known, strict=True)), style=False)
        ) if known else None,
    }  # fmt: skip


def _group(group: DuplicateGroup, audit: LoraAudit, thumbnails: Thumbnails) -> dict[str, Any]:
    back = {v.image for v in audit.verdicts if v.verdict in ("verbatim", "template")}
    return {
        "exact": group.exact,
        "similarity": group.similarity,
        "count": len(group.images),
        "back": len(back.intersection(group.images)),
        "tiles": [
            {"uri": thumbnails.training(n), "name": audit.training.images[n].name}
            for n in group.images[:IN_GROUP]
        ],
    }


def _clique(clique: Clique, audit: LoraAudit, thumbnails: Thumbnails) -> dict[str, Any]:
    return {
        "clique": clique,
        "name": audit.training.images[clique.nearest].name,
        "member": thumbnails.member(clique.member, clique.similarity),
        "training": thumbnails.training(clique.nearest),
    }


def _scores(audit: LoraAudit) -> list[dict[str, Any]]:
    """Return prompts with their scores, those that the LoRA drives hardest first."""
    rank = sorted(audit.scores, key=lambda score: (score.off - score.on, score.prompt))
    return [{"score": score, "delta": score.on - score.off} for score in rank[:PROMPTS]]


def _facts(audit: LoraAudit) -> list[tuple[str, Any]]:
    """Return what the file is and says of itself; what it does not say is left out."""
    lora, training = audit.lora, audit.training
    rows = [
        ("File", lora.name),
        ("sha256", lora.sha256),
        ("Dialect", lora.dialect),
        ("Modules", f"{lora.modules}, {', '.join(lora.kinds)}"),
        ("Rank", lora.rank),
        ("Epoch", lora.epoch and f"{lora.epoch} of {lora.epochs}" if lora.epochs else lora.epoch),
        ("Steps", lora.steps),
        ("Images times repeats, by its header", lora.images),
        ("Base model, by its header", lora.base_name),
        ("Hash of the base model, by its header", lora.base_hash),
        ("Audited on", audit.model),
        ("Base model's sha256", audit.model_fingerprint),
        ("Training folder", f"{training.folder.name}, {training.layout} layout"),
        ("Training images", len(audit.verdicts)),
        ("Held-out images", len(training.images) - len(audit.verdicts)),
        ("Trigger word", training.trigger or None),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _curve(audit: LoraAudit) -> dict[str, Any] | None:
    """Return the curve over epochs as a chart, None when there are fewer than two."""
    if len(audit.epochs) < 2:
        return None
    return embedded_chart(
        lambda theme, width: epoch_chart(
            audit.epochs, audit.headline.controls, audit.best_epoch, theme=theme, width=width
        ),
        desk=1760,
        phone=720,
    )
