"""Settings and results of `unmemorize mitigate`: plain frozen values, and summary.json."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...shared.mitigation.gate import MODES
from ...shared.score.calibration import Calibration
from ..common.result import dumps, versions
from .config import AuditConfig
from .result import GeneratedImage, rate, settings
from .work import Scored

UNMITIGATED = "none"
"""Stands for sampling as usual, with which every method is compared."""
SCHEMA_VERSION = 2
"""Of summary.json and the lines of results.jsonl."""


@dataclass(frozen=True, kw_only=True)
class MitigationConfig:
    """What to sample, how, and where to write."""

    audit: AuditConfig
    """Model, controls or calibration, and output folder; as in an audit."""
    texts: tuple[str, ...] = ()
    """Prompts besides those of `audit.prompts`."""
    methods: tuple[str, ...] = ()
    """Names from `METHODS`; none means the default."""
    gate: str = "calibrated"
    """`calibrated` acts on prompts above the threshold, `always` on all, `never` on none."""
    images: int = 4
    """Of each prompt and method, one a seed."""
    advise: bool = True
    """Also search for the smallest edits that bring the score under the threshold."""
    probe: bool = False
    """Also run the residual probe on prompts above the threshold whose training image is known."""
    training: Path | None = None
    """Folder of training images that all images are compared with and that `neighbour` keeps away
    from; None for those beside the prompts, and for the demo's own."""

    def __post_init__(self) -> None:
        if self.gate not in MODES:
            raise ValueError(f"`gate` must be one of {', '.join(MODES)}, got {self.gate!r}.")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One prompt sampled one way."""

    method: str
    """Name of the method, `none` for sampling as usual."""
    acted: bool
    """The gate let the method act."""
    change: str
    """What the method put in the prompt's place, for people; "" where it says nothing of it."""
    score_after: float | None
    """Score of the conditioning that was sampled with; None where the method leaves it alone."""
    seconds: float
    """Per image, the method's own work included."""
    images: tuple[GeneratedImage, ...]


@dataclass(frozen=True, kw_only=True)
class Rewording:
    """A smaller or other prompt and its verified score."""

    prompt: str
    edit: str
    score: float
    under_threshold: bool


@dataclass(frozen=True, kw_only=True)
class Search:
    """An embedding that was optimised towards an image, and what was sampled with it."""

    loss_before: float
    """Mean squared error of the predicted noise per element, with the empty prompt."""
    loss_after: float
    """The same with the optimised embedding."""
    images: tuple[str, ...]
    """Sampled with it, one a seed."""
    copied: tuple[bool | None, ...]
    """Per sampled image, whether it copies the image; None where too few images could tell."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Result of the residual probe: whether a training image still comes out without its prompt."""

    training: Search
    mirror: Search | None
    """Of the mirror image, never trained on; None where it is a training image as well."""


@dataclass(frozen=True, kw_only=True)
class MitigationEntry:
    """One prompt: a line of results.jsonl."""

    index: int
    prompt: str
    score: float
    """As its calibration scores, before anything is done."""
    memorized: bool
    """`score` is above the calibrated threshold."""
    trials: tuple[Trial, ...]
    """Sampling as usual first."""
    rewordings: tuple[Rewording, ...]
    residual: Probed | None = None
    """Of prompts above the threshold whose training image is known, with `probe` only."""

    def to_json(self) -> str:
        """Return the line of results.jsonl."""
        return dumps({"schema_version": SCHEMA_VERSION, **asdict(self)})


@dataclass(frozen=True, kw_only=True)
class MitigationResult:
    """Everything the page shows."""

    config: MitigationConfig
    calibration: Calibration
    entries: tuple[MitigationEntry, ...]
    summary: dict[str, Any]
    folder: Path


def summarize(
    config: MitigationConfig,
    scored: Scored,
    entries: Sequence[MitigationEntry],
    told: Sequence[str] = (),
    compared: int = 0,
) -> dict[str, Any]:
    """Return summary.json: per method, how many prompts it acted on, its time, and the copies left.

    Args:
        config: What was sampled.
        scored: The prompts with their scores.
        entries: The prompts with what each method made of them.
        told: About how copies were told, for people.
        compared: Training images that every image was compared with.
    """
    methods = {}
    for number, way in enumerate((UNMITIGATED, *config.methods)):
        trials = [entry.trials[number] for entry in entries]
        copied = [image.nearest.copied for trial in trials for image in trial.images
                  if image.nearest and image.nearest.copied is not None]  # fmt: skip
        methods[way] = {
            "acted_on": sum(trial.acted for trial in trials),
            "copies": rate(sum(map(bool, copied)), len(copied)),
            "seconds_per_image": statistics.median(trial.seconds for trial in trials),
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "model": asdict(scored.facts.info),
        "prompts": len(entries),
        "memorized": sum(entry.memorized for entry in entries),
        "gate": config.gate,
        "images": config.images,
        "score": scored.calibration.judge.settings.get("score", "magnitude"),
        "threshold": scored.calibration.judge.threshold,
        "methods": methods,
        "training_images": compared,
        "settings": settings(config.audit),
        "caveats": [*scored.caveats, *told],
        "versions": versions(),
    }
