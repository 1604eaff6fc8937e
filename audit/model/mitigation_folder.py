"""What `unmemorize mitigate` leaves in its folder, besides the pictures."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...shared.files.storage import write_text
from ...shared.score.calibration import Calibration
from ..common.result import dumps, versions
from ..common.subject import Facts
from .mitigation_page import render_mitigation, write_sheets
from .summary import rate, settings
from .trials import SCHEMA_VERSION, UNMITIGATED, MitigationConfig, MitigationEntry, MitigationResult


def summarize(
    config: MitigationConfig, facts: Facts, calibration: Calibration,
    entries: Sequence[MitigationEntry], caveat: str, compared: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return summary.json: per method, how many prompts it acted on, what it cost and left."""
    methods = {}
    for number, way in enumerate((UNMITIGATED, *config.methods)):
        trials = [entry.trials[number] for entry in entries]
        copied = [image.nearest.copied for trial in trials for image in trial.images
                  if image.nearest]  # fmt: skip
        methods[way] = {
            "acted_on": sum(trial.acted for trial in trials),
            "copies": rate(sum(map(bool, copied)), len(copied)) if compared else None,
            "seconds_per_image": statistics.median(trial.seconds for trial in trials),
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "model": asdict(facts.info),
        "prompts": len(entries),
        "memorized": sum(entry.memorized for entry in entries),
        "gate": config.gate,
        "images": config.images,
        "threshold": calibration.threshold,
        "methods": methods,
        "settings": settings(config.audit),
        "caveats": [*facts.caveats, *filter(None, [caveat])],
        "versions": versions(),
    }


def write_folder(result: MitigationResult) -> None:
    """Write results.jsonl, summary.json, the contact sheets and the page, each whole or not."""
    folder = result.folder
    write_text(folder / "results.jsonl", "".join(e.to_json() + "\n" for e in result.entries))
    result.calibration.save(folder / "calibration.json")
    write_sheets(result, folder)
    write_text(folder / "mitigation.html", render_mitigation(result, folder))
    write_text(folder / "summary.json", dumps(result.summary, indent=1) + "\n")
