"""The counts, rates and conditions of an audit: summary.json."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...shared.score.calibration import CONFIDENCE, Calibration, clopper_pearson
from ...shared.wording import counted
from ..common.result import ModelInfo, versions
from .config import AuditConfig
from .inputs import Inputs
from .result import SCHEMA_VERSION, AuditEntry

FOUND, NOTHING_FOUND = "found", "nothing_found"


def rate(hits: int, n: int) -> dict[str, Any] | None:
    """Return a share with its Clopper-Pearson interval; None when nothing was counted."""
    if n == 0:
        return None
    low, high = clopper_pearson(hits, n)
    return {"hits": hits, "n": n, "rate": hits / n, "low": low, "high": high,
            "confidence": CONFIDENCE}  # fmt: skip


def summarize(
    config: AuditConfig,
    inputs: Inputs,
    model: ModelInfo,
    calibration: Calibration,
    entries: Sequence[AuditEntry],
    *,
    caveats: Iterable[str],
    similarity: Mapping[str, Any] | None,
    timings: Mapping[str, float],
) -> dict[str, Any]:
    """Return summary.json: what was found, how sure that is, and under which conditions."""
    from scipy.stats import binomtest

    flagged = [entry for entry in entries if entry.memorized]
    chance = calibration.false_positive_rate
    return {
        "schema_version": SCHEMA_VERSION,
        "unmemorize": versions()["unmemorize"],
        "verdict": FOUND if flagged else NOTHING_FOUND,
        "counts": {
            "prompts": len(entries),
            "prompts_read": inputs.prompts.read,
            "duplicates_merged": inputs.prompts.duplicates,
            "empty_dropped": inputs.prompts.empty,
            "cut": sum(bool(entry.cut) for entry in entries),
            "flagged": len(flagged),
            "controls": len(calibration.control_scores),
            "explained": sum(entry.explanation is not None for entry in entries),
            "images": sum(len(entry.images) for entry in entries),
        },
        "flagged_rate": rate(len(flagged), len(entries)),
        "expected_by_chance": chance * len(entries),
        # Probability of at least so many flags if no prompt were memorized.
        "chance_p_value": float(
            binomtest(len(flagged), len(entries), chance, alternative="greater").pvalue
        ),
        "groups": _groups(entries),
        "calibration": {
            "name": calibration.controls,
            "n": len(calibration.control_scores),
            "threshold": calibration.threshold,
            "false_positive_rate": chance,
            "interval": list(calibration.interval),
            "confidence": CONFIDENCE,
            "reused": config.calibration is not None,
        },
        "model": asdict(model),
        "settings": settings(config),
        "similarity": similarity,
        "caveats": list(caveats),
        "warnings": _warnings(inputs, entries),
        "versions": versions(),
        "timings": {name: round(seconds, 3) for name, seconds in timings.items()},
    }


def settings(config: AuditConfig) -> dict[str, Any]:
    """Return the settings that decide the results, as plain JSON values."""
    detection = config.detection
    return {
        "seeds": list(detection.seeds),
        "steps": detection.steps,
        "schedule_steps": detection.schedule_steps,
        "cond_scale": detection.cond_scale,
        "sequential": config.sequential,
        "false_positive_rate": config.false_positive_rate,
        "explain": config.explain,
        "flagged_pictured": config.flagged_pictured,
        "images_per_prompt": config.images_per_prompt,
        "sample": config.sample,
        "generation_steps": config.generation_steps,
    }


def _groups(entries: Sequence[AuditEntry]) -> dict[str, Any]:
    names = dict.fromkeys(entry.group for entry in entries if entry.group)
    members = {name: [e for e in entries if e.group == name] for name in names}
    return {name: rate(sum(e.memorized for e in group), len(group))
            for name, group in members.items()}  # fmt: skip


def _warnings(inputs: Inputs, entries: Sequence[AuditEntry]) -> list[str]:
    found = []
    if empty := inputs.prompts.empty:
        found.append(f"{counted(empty, 'empty prompt was', 'empty prompts were')} left out.")
    if duplicates := inputs.prompts.duplicates:
        were = counted(duplicates, "repeated prompt was", "repeated prompts were")
        found.append(f"{were} merged with {'its' if duplicates == 1 else 'their'} first.")
    if shared := len(set(inputs.prompts.prompts) & set(inputs.controls)):
        are = counted(shared, "control prompt is", "control prompts are")
        found.append(f"{are} audited as well: the threshold may be too high.")
    for entry in entries:
        if n := len(entry.cut.split()):
            found.append(
                f"Prompt {entry.index} is too long for the text encoder: its last "
                f"{'word is' if n == 1 else f'{n} words are'} not read, from {entry.cut[:40]!r} on."
            )
    return found
