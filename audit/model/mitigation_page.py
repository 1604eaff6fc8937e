"""The page that shows prompts as they are and mitigated, side by side, and its contact sheets."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ... import demo
from ...shared.files.images import read_image, save_png
from ...shared.wording import counted
from ..common.pages import Embedder, render_page
from ..common.wording import MISSING, number
from .mitigation_result import UNMITIGATED, MitigationEntry, MitigationResult, Search, Trial

TILE = 192
"""Pixels of one image on a contact sheet."""
LABEL = 24
"""Pixels of the line above each row."""


def render_mitigation(result: MitigationResult, folder: Path) -> str:
    """Return the page as HTML, the same text for the same result and images.

    Raises:
        ImportError: The extra `reports` is not installed.
    """
    embed = Embedder(folder)
    return render_page(
        "mitigation.html.j2",
        summary=result.summary,
        model=result.summary["model"],
        demo=result.config.audit.model in demo.BUNDLED,
        headline=headline(result),
        opened=_opened(result),
        seeds=len(result.calibration.judge.settings.get("seeds", ())),
        cards=[_card(entry, result, embed) for entry in result.entries],
        methods=_methods(result),
        probed=any(entry.residual for entry in result.entries),
    )


def headline(result: MitigationResult) -> str:
    """Return the finding in plain words; it never calls anything safe."""
    flagged = result.summary["memorized"]
    prompts = counted(len(result.entries), "prompt", "prompts")
    return f"{flagged or 'None'} of {prompts} scored above the threshold"


def _opened(result: MitigationResult) -> list[dict[str, Any]]:
    """Return the prompts that the gate opened for, highest score first."""
    entries = [entry for entry in result.entries if any(trial.acted for trial in entry.trials)]
    entries.sort(key=lambda entry: (-entry.score, entry.index))
    return [{"prompt": entry.prompt, "score": entry.score} for entry in entries]


def _methods(result: MitigationResult) -> list[dict[str, Any]]:
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


def method_rows(result: MitigationResult) -> list[list[str]]:
    """Return the rows that the command prints, one a method."""
    prompts, rows = len(result.entries), []
    threshold = result.calibration.judge.threshold
    for way, row in enumerate(_methods(result)):
        after = [entry.trials[way].score_after for entry in result.entries]
        scored = [score for score in after if score is not None]
        above = sum(score > threshold for score in scored)
        acted = MISSING if row["name"] == UNMITIGATED else f"{row['acted_on']} of {prompts}"
        copies = f"{row['copies']['hits']} of {row['copies']['n']}" if row["copies"] else MISSING
        still = f"{above} of {len(scored)}" if scored else MISSING
        rows.append([row["title"], acted, still, copies, number(row["time"])])
    return rows


def _title(method: str) -> str:
    return "as it is" if method == UNMITIGATED else method.replace("_", " ")


def _card(entry: MitigationEntry, result: MitigationResult, embed: Embedder) -> dict[str, Any]:
    return {
        "index": entry.index,
        "prompt": entry.prompt,
        "score": entry.score,
        "memorized": entry.memorized,
        "ratio": number(entry.score / result.calibration.judge.threshold, 2),
        "rewordings": entry.rewordings,
        "rows": [_row(trial, entry, result.calibration.judge.threshold, embed)
                 for trial in entry.trials],
        "residual": _residual(entry, embed),
    }  # fmt: skip


def _row(trial: Trial, entry: MitigationEntry, threshold: float, embed: Embedder) -> dict[str, Any]:
    return {
        "method": _title(trial.method),
        "acted": trial.acted,
        "plain": trial.method == UNMITIGATED,
        "change": trial.change,
        "nearest": _nearest(trial, embed) if trial.acted or trial is entry.trials[0] else None,
        "score_after": trial.score_after,
        "still_above": trial.score_after is not None and trial.score_after > threshold,
        **_copies(image.nearest.copied for image in trial.images if image.nearest),
        "tiles": [
            {"uri": embed(image.path), "alt": f"{trial.method}, seed {image.seed}",
             "copied": bool(image.nearest and image.nearest.copied), "seed": image.seed}
            for image in trial.images
        ],
    }  # fmt: skip


def _residual(entry: MitigationEntry, embed: Embedder) -> list[dict[str, Any]]:
    """Return the residual probe: one row for the training image, one for its mirror image."""
    if entry.residual is None:
        return []
    return [
        _search("its training image", entry.residual.training, embed),
        _search("the mirror image, never trained on", entry.residual.mirror, embed),
    ]


def _search(target: str, search: Search | None, embed: Embedder) -> dict[str, Any]:
    """Return one row; without a mirror image to compare with, it says so itself."""
    if search is None:
        return {"what": f"{target}: the image is its own, so there is no control",
                "copies": "", "hot": False, "tiles": []}  # fmt: skip
    return {
        "what": target,
        **_copies(search.copied),
        "tiles": [
            {"uri": embed(path), "alt": f"towards {target}", "copied": bool(copied)}
            for path, copied in zip(search.images, search.copied, strict=True)
        ],
    }


def _copies(copied: Iterable[bool | None]) -> dict[str, Any]:
    """Return how many images are copies, of those of which it is known."""
    known = [value for value in copied if value is not None]
    return {"copies": f"{sum(known)} of {len(known)} copied" if known else "", "hot": any(known)}


def _nearest(trial: Trial, embed: Embedder) -> dict[str, Any] | None:
    """Return the training image that one of the images came nearest to, if any is known."""
    nearest = [image.nearest for image in trial.images if image.nearest]
    if not nearest:
        return None
    # What stands out most; a copy of another image than the prompt's own counts as much.
    best = min(nearest, key=lambda one: (not one.copied, one.ratio))
    return {
        "uri": embed(best.path), "caption": best.caption, "own": best.is_own,
        "similarity": number(best.similarity, 2),
    }  # fmt: skip


def write_sheets(result: MitigationResult, folder: Path) -> None:
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
                tile = read_image(folder / image.path)
                tile = tile.resize((TILE, TILE), Image.Resampling.LANCZOS)
                sheet.paste(tile, (column * TILE, top + LABEL))
        save_png(sheet, folder / "sheets" / f"{entry.index:05d}.png")
