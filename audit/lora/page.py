"""The page of a LoRA's audit: one HTML file that needs nothing else, safe to open and to send."""

from collections import Counter
from itertools import groupby
from typing import Any

from ...shared.drawing.heatmap import heatmap_css, prompt_heatmap_html
from ..common.pages import TEMPLATES, embedded_chart, render_page, safe
from ..common.result import versions
from .config import power_of
from .grid import load_marks, load_matrix, make_grid, twins_of
from .page_images import LARGE, Thumbnails, epoch_chart
from .result import ImageVerdict, LoraAudit

CARDS, SAMPLES = 24, 3
"""Flagged images that are shown side by side, and others for comparison."""
UNFOLDED = 4
"""Of these, so many without a click."""
MOST = {"groups": 12, "in_group": 8, "cliques": 12}
"""Groups of near-duplicates that are shown, images of each, and cliques of the attack."""
PROMPTS = 200
"""Prompts in the table of scores, largest difference first."""
SAYS = {
    "verbatim": "comes back", "template": "its layout comes back",
    "near": "closer than controls", "base": "the base model draws it", "none": "not found",
}  # fmt: skip
MOTION = {"template": "its motion comes back"}
"""Of a video model."""
ASKED = {
    "caption": "its caption", "example": "an example prompt", "trigger": "the trigger word",
    "paraphrase": "its caption, reworded",
    "empty": "no words", "attack": "the extraction attack",
}  # fmt: skip
ASKED_SHORT = ASKED | {
    "caption": "caption", "example": "example prompt", "paraphrase": "caption, reworded",
    "trigger": "trigger word", "attack": "attack",
}  # fmt: skip
TITLES = {
    "duplicates": "Duplicates in the folder", "captions": "One caption on several images",
    "repeats": "Repeats", "epochs": "Epochs", "rank": "Rank",
}  # fmt: skip
COMMAND = "command"
"""The setting that is shown as the way to get the page again."""


def render_lora_page(audit: LoraAudit, *, include_images: bool) -> str:
    """Return the page as HTML, the same text for the same audit and images.

    Args:
        audit: What the page shows.
        include_images: Show training images as they are; otherwise a few pixels of them.

    Raises:
        ImportError: The extra `reports` is not installed.
        ValueError: similarity.npz does not fit the audit.
    """
    thumbnails = Thumbnails(audit, include_images=include_images)
    grid = make_grid(audit, load_matrix(audit), load_marks(audit))
    settings = dict(audit.settings)
    return render_page(
        "lora.html.j2",
        script="lora.js",
        style=heatmap_css() + (TEMPLATES / "lora.css").read_text("utf-8"),
        audit=audit,
        thumbnails=thumbnails,
        include_images=include_images,
        most=MOST,
        unfolded=UNFOLDED,
        says=SAYS | MOTION if audit.video else SAYS,
        asked_short=ASKED_SHORT,
        titles=TITLES,
        facts=_facts(audit),
        version=versions()["unmemorize"],
        command=settings.pop(COMMAND, ""),
        power=_power(audit),
        settings=list(settings.items()),
        grid=grid,
        heads=[(title, len(list(group)))
               for title, group in groupby(column.title for column in grid.columns)],
        **_cards(audit, thumbnails),
        back={v.image for v in audit.verdicts if v.verdict in ("verbatim", "template")},
        curve=_curve(audit),
        scores=sorted(audit.scores, key=lambda s: (s.off - s.on, s.prompt))[:PROMPTS],
    )  # fmt: skip


def _cards(audit: LoraAudit, thumbnails: Thumbnails) -> dict[str, Any]:
    """Return flagged images, gravest first, and a few others for comparison."""
    rank = audit.ranked
    flagged = [verdict for verdict in rank if verdict.verdict != "none"]
    others = rank[len(flagged) :][:SAMPLES]
    twins = twins_of(audit)
    return {
        "cards": [_card(verdict, audit, thumbnails, twins) for verdict in flagged[:CARDS]],
        "cards_left": max(len(flagged) - CARDS, 0),
        "samples": [_card(verdict, audit, thumbnails, twins) for verdict in others],
    }


def _card(
    verdict: ImageVerdict, audit: LoraAudit, thumbnails: Thumbnails, twins: dict[int, int]
) -> dict[str, Any]:
    image = audit.training.images[verdict.image]
    tiles: list[dict[str, Any]] = [
        {"title": "training image", "text": image.name, "truth": True,
         "uri": thumbnails.training(verdict.image, LARGE)}
    ]  # fmt: skip
    if verdict.generation is not None:
        made = audit.generations[verdict.generation]
        tiles.append({"title": "with the LoRA", "truth": False,
                      "text": f"from {ASKED[made.asked]}, seed {made.seed}",
                      "uri": thumbnails.generation(verdict.generation, LARGE)})  # fmt: skip
        if (twin := twins.get(verdict.generation)) is not None:
            tiles.append({"title": "LoRA off", "text": "same words, same seed", "truth": False,
                          "uri": thumbnails.generation(twin, LARGE)})  # fmt: skip
    known = dict(audit.words).get(image.caption, ())
    return {
        "number": verdict.image, "verdict": verdict, "caption": image.caption,
        "repeats": image.repeats, "tiles": tiles,
        "heatmap": safe(
            prompt_heatmap_html(*map(list, zip(*known, strict=True)), style=False)
        ) if known else None,
    }  # fmt: skip


def _power(audit: LoraAudit) -> tuple[int, float] | None:
    """Return how many seeds each caption had, and how surely one of them shows what a third do."""
    seeds = Counter(g.source for g in audit.generations if g.lora and g.asked == "caption")
    return (count := min(seeds.values()), power_of(count)) if seeds else None


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
