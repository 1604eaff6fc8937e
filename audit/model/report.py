"""The page an audit ends with: one HTML file that needs nothing else, safe to open and to send."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...shared.drawing import maps as pictures
from ...shared.wording import counted
from ..common.pages import render_page, svg_uri
from ..common.wording import facts, headline, lead, number, reproduce
from .gallery import gallery

if TYPE_CHECKING:
    from .result import AuditResult


def render_report(result: "AuditResult", folder: Path) -> str:
    """Return the report as HTML, the same text for the same result and pictures.

    Args:
        result: What the audit found.
        folder: With its pictures.

    Raises:
        ImportError: The extra `reports` is not installed.
    """
    return render_page(
        "report.html.j2",
        script="report.js",
        style=pictures.heatmap_css(),
        **_verdict(result),
        **gallery(result, folder),
        **_figures(result),
        rows=sorted(result.entries, key=lambda entry: (-entry.score, entry.index)),
        facts=facts(result),
        command=reproduce(result),
    )


def _verdict(result: "AuditResult") -> dict[str, Any]:
    """Return what the top of the page says: the finding, its certainty, its caveats."""
    summary, model = result.summary, result.model
    rate, calibration = summary["flagged_rate"], summary["calibration"]
    return {
        "model": model,
        "demo": result.config.model == "demo",
        "version": summary["unmemorize"],
        "headline": headline(rate, summary["chance_p_value"]),
        "lead": lead(result),
        "caveats": summary["caveats"],
        "warnings": summary["warnings"],
        "flagged_rate": rate,
        "expected": summary["expected_by_chance"],
        "chance": summary["chance_p_value"],
        "calibration": calibration,
        "per_element": calibration["threshold"] / math.sqrt(math.prod(model.latent_shape)),
        "smallest_p": 1 / (calibration["n"] + 1),
        "similarity": summary["similarity"],
        "groups": list(summary["groups"].items()),
    }


def _figures(result: "AuditResult") -> dict[str, Any]:
    """Return the distribution plot for phone and desk, light and dark."""
    calibration, entries = result.calibration, result.entries
    scores = [entry.score for entry in entries]
    flags = [entry.memorized for entry in entries]
    controls = calibration.sorted_scores.tolist()

    def draw(theme: pictures.Theme, width: float) -> str:
        return svg_uri(
            pictures.score_distribution_figure(
                scores, flags, controls, calibration.threshold, theme=theme, width=width
            )
        )

    phone, dark = "(max-width: 40rem)", "screen and (prefers-color-scheme: dark)"
    return {
        "distribution": {
            "uri": draw("light", 8.8),
            "sources": [
                {"media": f"{dark} and {phone}", "uri": draw("dark", 3.6)},
                {"media": phone, "uri": draw("light", 3.6)},
                {"media": dark, "uri": draw("dark", 8.8)},
            ],
        },
        "distribution_alt": (
            f"Scores of {counted(len(scores), 'audited prompt', 'audited prompts')} and "
            f"{counted(len(controls), 'control', 'controls')}; "
            f"{counted(sum(flags), 'lies', 'lie')} above the threshold of "
            f"{number(calibration.threshold)}."
        ),
    }
