"""The page that shows prompts as they are and mitigated, side by side, and its contact sheets."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...shared.files.storage import replace_atomically
from ...shared.wording import counted
from ..common.pages import Embedder, render_page
from ..common.wording import MISSING, number
from .trials import UNMITIGATED

if TYPE_CHECKING:
    from .trials import MitigationEntry, MitigationResult, Trial

TILE = 192
"""Pixels of one picture on a contact sheet."""
LABEL = 24
"""Pixels of the line above each row."""


def render_mitigation(result: "MitigationResult", folder: Path) -> str:
    """Return the page as HTML, the same text for the same result and pictures.

    Raises:
        ImportError: The extra `reports` is not installed.
    """
    embed = Embedder(folder)
    return render_page(
        "mitigation.html.j2",
        summary=result.summary,
        model=result.summary["model"],
        demo=result.config.audit.model == "demo",
        headline=headline(result),
        cards=[_card(entry, result, embed) for entry in result.entries],
        methods=_methods(result),
        probed=any(entry.residual for entry in result.entries),
    )


def headline(result: "MitigationResult") -> str:
    """Return in plain words what became of the prompts; it never calls anything safe."""
    flagged = result.summary["memorized"]
    prompts = counted(len(result.entries), "prompt", "prompts")
    return f"{flagged or 'None'} of {prompts} scored above the threshold"


def _methods(result: "MitigationResult") -> list[dict[str, Any]]:
    """Return one row a method, its time relative to sampling as usual."""
    methods = result.summary["methods"]
    plain = methods[UNMITIGATED]["seconds_per_image"]
    return [
        {
            **values,
            "name": name,
            "title": _title(name),
            "time": values["seconds_per_image"] / plain if plain else None,
        }
        for name, values in methods.items()
    ]


def method_rows(result: "MitigationResult") -> list[list[str]]:
    """Return the rows that the command prints, one a method."""
    prompts, rows = len(result.entries), []
    for row in _methods(result):
        acted = MISSING if row["name"] == UNMITIGATED else f"{row['acted_on']} of {prompts}"
        copies = f"{row['copies']['hits']} of {row['copies']['n']}" if row["copies"] else MISSING
        rows.append([row["title"], acted, copies, number(row["time"])])
    return rows


def _title(method: str) -> str:
    return "as it is" if method == UNMITIGATED else method.replace("_", " ")


def _card(entry: "MitigationEntry", result: "MitigationResult", embed: Embedder) -> dict[str, Any]:
    return {
        "index": entry.index,
        "prompt": entry.prompt,
        "score": entry.score,
        "memorized": entry.memorized,
        "ratio": number(entry.score / result.calibration.threshold, 2),
        "rewordings": entry.rewordings,
        "truth": _truth(entry, embed),
        "rows": [_row(trial, embed) for trial in entry.trials],
        "residual": _residual(entry, embed),
    }


def _row(trial: "Trial", embed: Embedder) -> dict[str, Any]:
    copied = [image.nearest.copied for image in trial.images if image.nearest]
    known = [value for value in copied if value is not None]
    return {
        "method": _title(trial.method),
        "acted": trial.acted,
        "plain": trial.method == UNMITIGATED,
        "score_after": trial.score_after,
        "copies": f"{sum(known)} of {len(known)} copied" if known else "",
        "hot": any(known),
        "tiles": [
            {"uri": embed(image.path), "alt": f"{trial.method}, seed {image.seed}",
             "copied": bool(image.nearest and image.nearest.copied), "seed": image.seed}
            for image in trial.images
        ],
    }  # fmt: skip


def _residual(entry: "MitigationEntry", embed: Embedder) -> list[dict[str, Any]]:
    """Return what came of optimised embeddings: one row for the training image, one for its mirror.

    Without a mirror image to compare with, the row says so itself.
    """
    if entry.residual is None:
        return []
    rows = []
    for what, sought in (
        ("its training picture", entry.residual.training),
        ("the mirror image, never trained on", entry.residual.mirror),
    ):
        if sought is None:
            rows.append({"what": f"{what}: the picture is its own, so there is no control",
                         "copies": "", "hot": False, "tiles": []})  # fmt: skip
            continue
        known = [copied for copied in sought.copied if copied is not None]
        rows.append({
            "what": what,
            "copies": f"{sum(known)} of {len(known)} copied" if known else "",
            "hot": any(known),
            "tiles": [
                {"uri": embed(path), "alt": f"towards {what}", "copied": bool(copied)}
                for path, copied in zip(sought.images, sought.copied, strict=True)
            ],
        })  # fmt: skip
    return rows


def _truth(entry: "MitigationEntry", embed: Embedder) -> dict[str, Any] | None:
    """Return the training picture that sampling as usual came nearest to, if any is known."""
    nearest = [image.nearest for image in entry.trials[0].images if image.nearest]
    if not nearest:
        return None
    best = min(nearest, key=lambda one: (not one.is_own, one.ratio))
    return {"uri": embed(best.path), "caption": best.caption, "own": best.is_own}


def write_sheets(result: "MitigationResult", folder: Path) -> None:
    """Write one contact sheet a prompt: a row a method, a column a seed."""
    from PIL import Image, ImageDraw

    for entry in result.entries:
        columns = len(entry.trials[0].images)
        size = columns * TILE, len(entry.trials) * (TILE + LABEL)
        sheet = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(sheet)
        for row, trial in enumerate(entry.trials):
            top = row * (TILE + LABEL)
            after = "" if trial.score_after is None else f", score {number(trial.score_after)}"
            draw.text((4, top + 6), trial.method + after, fill="black")
            for column, image in enumerate(trial.images):
                with Image.open(folder / image.path) as picture:
                    tile = picture.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
                sheet.paste(tile, (column * TILE, top + LABEL))
        with replace_atomically(folder / "sheets" / f"{entry.index:05d}.png") as part:
            sheet.save(part, format="PNG")
