"""What `unmemorize mitigate` was asked and what it found: plain frozen values."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.result import dumps
from .config import AuditConfig
from .result import GeneratedImage

if TYPE_CHECKING:
    from ...shared.score.calibration import Calibration

UNMITIGATED = "none"
"""Stands for sampling as usual, with which every method is compared."""
SCHEMA_VERSION = 1
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
    """`calibrated` acts on prompts above the threshold only; `always` and `never` do not ask."""
    images: int = 4
    """Of each prompt and method, one a seed."""
    advise: bool = True
    """Also search for the smallest edits that bring the score under the threshold."""
    probe: bool = False
    """Also seek the training images of prompts above the threshold with optimised embeddings."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One prompt sampled one way."""

    method: str
    """Name of the method, `none` for sampling as usual."""
    acted: bool
    """The gate let the method act."""
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
class Sought:
    """An image that an embedding was optimised towards, and what was sampled with it."""

    loss_before: float
    """Mean squared error of the predicted noise per element, with the empty prompt."""
    loss_after: float
    """The same with the optimised embedding."""
    images: tuple[str, ...]
    """Pictures sampled with it, one a seed."""
    copied: tuple[bool | None, ...]
    """Per picture, whether it is a copy of the image; None where too few images could tell."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Whether a training image still comes out without its prompt."""

    training: Sought
    mirror: Sought | None
    """The mirror image, never trained on; None where it is a training image as well."""


@dataclass(frozen=True, kw_only=True)
class MitigationEntry:
    """One prompt: a line of results.jsonl."""

    index: int
    prompt: str
    score: float
    """Mean L2 norm of the text-conditional noise, latent units, before anything is done."""
    memorized: bool
    """`score` is above the calibrated threshold."""
    trials: tuple[Trial, ...]
    """Sampling as usual first."""
    rewordings: tuple[Rewording, ...]
    residual: Probed | None = None
    """Of prompts above the threshold whose training image is known, when it was asked for."""

    def to_json(self) -> str:
        """Return the line of results.jsonl."""
        return dumps({"schema_version": SCHEMA_VERSION, **asdict(self)})


@dataclass(frozen=True, kw_only=True)
class MitigationResult:
    """Everything the page shows."""

    config: MitigationConfig
    calibration: "Calibration"
    entries: tuple[MitigationEntry, ...]
    summary: dict[str, Any]
    folder: Path
