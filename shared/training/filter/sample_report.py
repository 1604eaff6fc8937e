"""The ranked list of a training's samples as files: JSON to keep, text to read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...files.storage import write_text
from .sample_log import RankedSample, rank_samples, read_records

SHOWN = 20
"""Samples in the text."""


def records_path(report: Path, process: int) -> Path:
    """Return where a process of the training writes its records: beside the report."""
    return report.with_suffix(f".{process}.jsonl" if process else ".jsonl")


def write_report(report: Path, processes: int, account: Mapping[str, Any]) -> list[RankedSample]:
    """Rank the samples of all processes, write `report` and a text beside it, return the list.

    Args:
        report: The JSON file.
        processes: How many wrote records.
        account: Settings and counts that stand above the list, plain data.

    Raises:
        StorageError: A file cannot be written.
    """
    ranked = rank_samples(read_records(records_path(report, each) for each in range(processes)))
    samples = [asdict(each) | asdict(each.sample) for each in ranked]
    for sample in samples:
        del sample["sample"]
    write_text(report, json.dumps({**account, "samples": samples}, indent=1) + "\n")
    write_text(report.with_suffix(".txt"), "\n".join(_lines(ranked, account)) + "\n")
    return ranked


def _lines(ranked: Sequence[RankedSample], account: Mapping[str, Any]) -> Iterable[str]:
    """Yield the most memorized samples, one a line."""
    yield f"{account['flagged']} of {account['seen']} sample visits stood at or above threshold."
    if account["measured"] < account["seen"]:
        yield (
            f"{account['measured']} of their scores were measured; the others were expected from "
            "earlier visits."
        )
    yield "standing: mean share of records at like timesteps with a lower score, 0 to 1"
    yield "times: what the caption scores at like timesteps, over what the median caption does"
    yield "standing  times  flagged  visits  highest  sample"
    for each in ranked[:SHOWN]:
        alike = f"  (alike: {', '.join(each.duplicates)})" if each.duplicates else ""
        yield (
            f"{each.standing:8.2f}  {each.ratio:5.2f}  {each.flagged:7d}  {each.visits:6d}  "
            f"{each.highest:7.4f}  {each.sample.file}{alike}"
        )
