"""What a resumed training reads of the protection: its types, and the digest of all of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..files.schema import Count, Misfit, Reader, conform, digest_of
from ..files.weights import ModelError

DIGEST = "digest"
"""The field that holds the sha256 of all others; states of earlier versions lack it."""
READER = Reader(
    ModelError, "a state of the protection", "Resume from another checkpoint, or from none."
)


@dataclass(frozen=True, kw_only=True)
class RegionState:
    """Of `BaseTargets`."""

    samples: Count
    named: Count
    with_regions: Count
    places: float


@dataclass(frozen=True, kw_only=True)
class ThresholdState:
    """Of `RunningQuantile`; other thresholds remember nothing."""

    scores: list[list[float]] | None = None


@dataclass(frozen=True, kw_only=True)
class ExpectationState:
    """Of `Expectation`: number, mean and count of each bin, caption and file."""

    drift: float
    levels: list[tuple[Count, float, Count]]
    captions: list[tuple[Count, float, Count]]
    files: list[tuple[Count, float, Count]]
    spared: Count = 0


@dataclass(frozen=True, kw_only=True)
class RecallState:
    """Of `Recall`: number of a caption or file, and visits since."""

    since: list[tuple[Count, Count]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class FilterState:
    """Of `MemorizationFilter`."""

    calls: Count
    seen: Count
    measured: Count
    flagged: Count
    draws: bool = True
    threshold: ThresholdState | None = None
    expectation: ExpectationState | None = None
    recall: RecallState | None = None


@dataclass(frozen=True, kw_only=True)
class SubtractionState:
    """Of one concept of `SubtractedTraining`."""

    visits: Count
    subtracted: Count
    changed: Count


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Of `Protection`; what a method did not use is absent."""

    steps: Count | None = None
    regions: RegionState | None = None
    filter: FilterState | None = None
    subtraction: list[SubtractionState] | None = None


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with its digest; nothing of nothing."""
    return {**state, DIGEST: digest_of(state, DIGEST)} if state else {}


def check_state(state: Any) -> None:
    """Make sure that a state is one that `sealed` returned, or of an earlier version.

    Raises:
        Misfit: A value is of another type; names key, found and expected.
        ValueError: It was changed since.
    """
    plain = json.loads(json.dumps(state))  # as it comes from a file, whoever hands it over
    conform(plain, TrainingState, foreign=True)
    known = {each.name for each in fields(TrainingState)}
    if DIGEST in plain:
        if plain[DIGEST] != digest_of(plain, DIGEST):
            raise ValueError("its values are not those that were saved: the digest differs.")
    elif unknown := sorted(plain.keys() - known):
        raise Misfit(f"the whole has unknown fields {unknown}, expected {sorted(known)}.")
