"""What an audit found: plain frozen values, the lines of results.jsonl, and summary.json."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.result import ModelInfo, dumps

if TYPE_CHECKING:
    from ...shared.score.calibration import Calibration
    from .config import AuditConfig

SCHEMA_VERSION = 1
"""Of summary.json and of the lines of results.jsonl; raised when a field changes its meaning."""


@dataclass(frozen=True, kw_only=True)
class OccludedWord:
    """What the score does when one word is left out."""

    word: str
    score_before: float
    score_after: float


@dataclass(frozen=True, kw_only=True)
class WordSignificance:
    """Which words carry the score of one prompt."""

    words: tuple[str, ...]
    """As typed, in order."""
    significance: tuple[float, ...]
    """Per word, norm of the score's gradient; only ratios within one prompt mean something."""
    occlusions: tuple[OccludedWord, ...]
    """Strongest fall first."""
    suggestions: tuple[str, ...]
    """Sentences: without X the score falls from a to b."""


@dataclass(frozen=True, kw_only=True)
class NearestImage:
    """The training image that a generated image resembles most."""

    path: str | None
    """Of a small copy, relative to the output folder."""
    caption: str
    similarity: float
    """1 minus the root mean square difference of the two thumbnails: 1 is equal."""
    ratio: float
    """Distance relative to the other near training images; small: this one alone is meant."""
    is_own: bool
    """The nearest training image belongs to the prompt that was sampled."""
    copied: bool | None
    """`ratio` is below the calibrated one; None when too few training images are known."""


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """One image sampled for a prompt."""

    path: str
    """Relative to the output folder, with forward slashes."""
    seed: int
    nearest: NearestImage | None
    """None when no training images are known."""


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """One audited prompt: a line of results.jsonl."""

    index: int
    """Position in the prompt set, first occurrence."""
    prompt: str
    """Exactly as read: any script, markup and control characters included. Escape it to show it."""
    sources: tuple[str, ...]
    """Where it was read, `file:line` or an image file name."""
    count: int
    """How often the prompts contained it."""
    cut: str
    """The end that the text encoder did not read, empty when all of it fitted."""
    group: str | None
    """Known truth, only for the demo model: verbatim, template, learnt, held_out."""
    score: float
    """Mean L2 norm of the text-conditional noise, latent units."""
    score_per_element: float
    """`score` over the square root of the number of latent elements."""
    trace: tuple[tuple[float | None, ...], ...]
    """[seed step] L2 norms; None where the sequential mode did not draw."""
    p_value: float
    """Share of controls that score at least as high (with the usual + 1)."""
    q_value: float
    """`p_value` after Benjamini-Hochberg over the audited prompts."""
    memorized: bool
    """`score` is above the calibrated threshold."""
    explanation: WordSignificance | None
    images: tuple[GeneratedImage, ...]
    map: str | None
    """Score-difference map over the first image, relative path."""

    def to_json(self) -> str:
        """Return the line of results.jsonl."""
        return dumps({"schema_version": SCHEMA_VERSION, **asdict(self)})


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """Everything a report shows."""

    config: "AuditConfig"
    model: ModelInfo
    calibration: "Calibration"
    entries: tuple[AuditEntry, ...]
    """In the order of the prompts."""
    summary: dict[str, Any]
    """As written to summary.json."""
    folder: Path

    @property
    def flagged(self) -> list[AuditEntry]:
        """Return the memorized prompts, highest score first."""
        hits = [entry for entry in self.entries if entry.memorized]
        return sorted(hits, key=lambda entry: (-entry.score, entry.index))
