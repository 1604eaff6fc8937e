"""The filter's decisions on each sample: recorded, ranked, and reported at the end."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ...files.storage import Entries, write_text
from ...files.weights import file_sha256

FLUSH = 50
"""Calls after which records are written: a sync to disk at each would cost more than a step."""
BINS = 10
"""Of timesteps, in which scores are compared."""
SMALLEST = 1e-6
"""Lower scores come from dropped captions, and say nothing about the caption."""
SHOWN = 20
"""Samples in the text report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An image with its caption, as the trainer knows them."""

    file: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One decision."""

    sample: Sample
    timestep: float
    score: float
    """Text-conditional magnitude, RMS per latent element; not finite in a diverged training."""
    measured: bool
    """True for a score measured in this step, False for one expected from earlier steps."""
    flagged: bool
    """At or above the threshold."""
    kept: float
    """Share that stayed in the loss, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class RankedSample:
    """One sample over the whole training."""

    sample: Sample
    standing: float
    """Mean over its visits of the share of records at like timesteps with a lower score, 0..1."""
    visits: int
    measured: int
    """Visits whose score was measured, not expected."""
    flagged: int
    """Visits at or above the threshold."""
    highest: float
    """Score."""
    ratio: float
    """Its caption's score over the median caption's at like timesteps, a geometric mean over all
    visits; 1 where all samples share one caption, 0 where all its scores are below `SMALLEST`."""
    duplicates: tuple[str, ...]
    """Other files with the same content or the same caption."""


class SampleLog:
    """Records of one process in a JSON Lines file of its own, continued by a resumed training.

    They are written every `FLUSH` calls; call `flush` at each checkpoint and at the end.
    """

    def __init__(self, path: Path):
        self._written = Entries(path)
        self._waiting: dict[str, dict] = {}

    def add(self, call: int, records: Sequence[Record]) -> None:
        """Keep the records of the filter's `call`, and write them when it is their turn."""
        for row, record in enumerate(records):
            value = asdict(record) | asdict(record.sample)
            del value["sample"]
            value["score"] = record.score if math.isfinite(record.score) else None
            self._waiting[f"{call}/{row}"] = value
        if call % FLUSH == FLUSH - 1:
            self.flush()

    def flush(self) -> None:
        """Write the records that wait.

        Raises:
            StorageError: The disk is full or the file cannot be written.
        """
        if self._waiting:
            self._written.put_all(self._waiting)
            self._waiting = {}


def records_path(report: Path, process: int) -> Path:
    """Return where a process of the training writes its records: beside the report."""
    return report.with_suffix(f".{process}.jsonl" if process else ".jsonl")


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Return the records in the files of all processes, each decision once."""
    samples: dict[Sample, Sample] = {}
    records: list[Record] = []
    for path in paths:
        own: dict[str, Record] = {}

        def take(key: str, value: dict, own: dict[str, Record] = own) -> None:
            sample = Sample(file=value.pop("file"), caption=value.pop("caption"))
            score = math.nan if value["score"] is None else value["score"]
            # One object for each sample: a long training has a hundred visits of every one.
            sample = samples.setdefault(sample, sample)
            own[key] = Record(**(value | {"sample": sample, "score": score}))

        Entries(path, take)
        records += own.values()
    return records


def rank_samples(records: Iterable[Record]) -> list[RankedSample]:
    """Return every sample of all processes' records with its duplicates, the most memorized first.

    Scores move strongly with the timestep, so each is compared only with those of its bin.
    """
    finite = [record for record in records if math.isfinite(record.score)]
    ratios = _ratios(finite)
    visits: dict[Sample, list[tuple[Record, float]]] = defaultdict(list)
    for record, standing in _standings(finite):
        visits[record.sample].append((record, standing))
    alike: dict[tuple[str, str], set[str]] = defaultdict(set)
    marks: dict[Sample, list[tuple[str, str]]] = {}
    for sample in visits:
        marks[sample] = [("content", _content(sample.file))]
        if sample.caption:
            marks[sample].append(("caption", sample.caption))
        for mark in marks[sample]:
            alike[mark].add(sample.file)
    ranked = [
        RankedSample(
            sample=sample,
            standing=sum(standing for _, standing in seen) / len(seen),
            visits=len(seen),
            measured=sum(record.measured for record, _ in seen),
            flagged=sum(record.flagged for record, _ in seen),
            highest=max(record.score for record, _ in seen),
            ratio=ratios.get(sample.caption or sample.file, 0.0),
            duplicates=tuple(
                sorted(set().union(*(alike[mark] for mark in marks[sample])) - {sample.file})
            ),
        )
        for sample, seen in visits.items()
    ]
    return sorted(ranked, key=lambda each: (-each.standing, each.sample.file))


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
    """Yield the text report: the most memorized samples, one a line."""
    yield f"{account['flagged']} of {account['seen']} sample visits were at or above the threshold."
    if account["measured"] < account["seen"]:
        yield (
            f"{account['measured']} scores were measured; the others were expected from earlier "
            "visits."
        )
    yield "standing: mean share of records at like timesteps with a lower score, 0 to 1"
    yield "times: the caption's score at like timesteps, over the median caption's"
    yield "standing  times  flagged  visits  highest  sample"
    for each in ranked[:SHOWN]:
        alike = f"  (alike: {', '.join(each.duplicates)})" if each.duplicates else ""
        yield (
            f"{each.standing:8.2f}  {each.ratio:5.2f}  {each.flagged:7d}  {each.visits:6d}  "
            f"{each.highest:7.4f}  {each.sample.file}{alike}"
        )


def _content(file: str) -> str:
    """Return the sha256 of a file, or its name where it cannot be read."""
    path = Path(file)
    return file_sha256(path) if path.is_file() else file


def _standings(records: Sequence[Record]) -> Iterable[tuple[Record, float]]:
    """Yield each record with the share of others in its bin of timesteps that score lower."""
    for members in _binned(records):
        lower = 0
        members.sort(key=lambda record: record.score)
        for _, equal in groupby(members, key=lambda record: record.score):
            ties = list(equal)
            for record in ties:
                yield record, lower / max(1, len(members) - 1)
            lower += len(ties)


def _ratios(records: Sequence[Record]) -> dict[str, float]:
    """Return by caption, or by file where there is none, its score over the median one's."""
    logs: dict[str, list[float]] = defaultdict(list)
    for members in _binned(records):
        scored = [(each, math.log(each.score)) for each in members if each.score >= SMALLEST]
        level = statistics.fmean(score for _, score in scored) if scored else 0.0
        for record, score in scored:
            logs[record.sample.caption or record.sample.file].append(score - level)
    means = {name: statistics.fmean(each) for name, each in logs.items()}
    usual = statistics.median(means.values()) if means else 0.0
    return {name: math.exp(mean - usual) for name, mean in means.items()}


def _binned(records: Sequence[Record]) -> Iterable[list[Record]]:
    """Yield the records of each bin of timesteps that has some."""
    low = min((record.timestep for record in records), default=0.0)
    span = max((record.timestep for record in records), default=1.0) - low or 1.0

    def bin_of(record: Record) -> int:
        return min(BINS - 1, int((record.timestep - low) / span * BINS))

    for _, group in groupby(sorted(records, key=bin_of), key=bin_of):
        yield list(group)
