"""What an audit of prompts gives: the lines of results.jsonl, and summary.json."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ...shared.score.calibration import Calibration
from ...shared.score.rates import CONFIDENCE, clopper_pearson
from ...shared.wording import bare, counted
from ..common.result import ModelInfo, dumps, versions
from .config import AuditConfig, measured_score
from .inputs import Inputs

SCHEMA_VERSION = 2
"""Of summary.json and of the lines of results.jsonl; raised when a field changes its meaning."""


Outcome = Literal["gone", "back", "another", "unknown"]


@dataclass(frozen=True, kw_only=True)
class OccludedWord:
    """What the magnitude does when one word is left out."""

    word: str
    index: int
    """Which word of the prompt, from 0."""
    score_before: float
    score_after: float


@dataclass(frozen=True, kw_only=True)
class NearestImage:
    """The training image that a generated image resembles most."""

    path: str | None
    """Of a small copy, relative to the output folder."""
    caption: str
    similarity: float
    """In the units of what images are compared by: 1 is equal."""
    ratio: float
    """Distance over that of the next training image; small: this one alone is meant."""
    own_ratio: float | None
    """Distance to the nearest of the prompt's own training images over the 5 % quantile of what
    other prompts' images reach to the nearest of them; None without an own one, or when too few
    others were drawn."""
    is_own: bool
    """The nearest training image belongs to the prompt that was sampled."""
    copied: bool | None
    """A copy of its own or of any training image; None when nothing can tell."""


@dataclass(frozen=True, kw_only=True)
class RedrawnImage:
    """A flagged prompt without one word, drawn once from a seed whose image was a copy."""

    word: str
    index: int
    """Which word of the prompt, from 0."""
    prompt: str
    """Without the word."""
    path: str
    """Of the image, relative to the output folder."""
    seed: int
    nearest: NearestImage
    outcome: Outcome
    """No copy any more; a copy of the same training image; one of another; or not to be told."""

    @property
    def observation(self) -> str:
        """Return what became of the image, as a clause."""
        said = {
            "gone": "the image no longer comes back",
            "back": "the image still comes back",
            "another": "another training image comes back",
            "unknown": "nothing can tell whether the image comes back",
        }[self.outcome]
        return f"{said} (drawn once, seed {self.seed})"

    def __str__(self) -> str:
        return f"without “{bare(self.word)}” {self.observation}"


@dataclass(frozen=True, kw_only=True)
class WordSignificance:
    """Which words carry the score of one prompt."""

    method: Literal["leave_out", "input_gradient", "encoder_gradient"]
    """What `significance` is; an audit leaves words out."""
    words: tuple[str, ...]
    """As typed, in order."""
    significance: tuple[float | None, ...]
    """Per word, how far the prediction changes without it (L2, latent units, >= 0); None for words
    that were not left out."""
    occlusions: tuple[OccludedWord, ...]
    """Of each word that was left out, greatest change of the prediction first."""
    suggestions: tuple[str, ...]
    """Sentences: without X the magnitude falls from a to b."""
    notes: tuple[str, ...] = ()
    """Sentences on what was not measured."""
    redrawn: tuple[RedrawnImage, ...] = ()
    """Of the strongest words, where the prompt's image was a copy."""


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """One image sampled for a prompt."""

    path: str
    """Relative to the output folder, with forward slashes."""
    seed: int
    nearest: NearestImage | None
    """None when no training images are known."""


@dataclass(frozen=True, kw_only=True)
class NearPrompt:
    """The memorized prompt that a flagged one is near to."""

    index: int
    """Of the memorized prompt."""
    prompt: str
    """Its text."""
    overlap: float
    """Share of both prompts' words that both have, 0..1."""
    cosine: float
    """Of what the two add outside of what controls add, at one starting noise; 1 is the same."""


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
    """Mean of `trace`, as `calibration.score` in summary.json says: of the residual score, 1 for an
    ordinary prompt, or of |D|, L2 norm in latent units."""
    trace: tuple[tuple[float | None, ...], ...]
    """[seed step] The scores of single passes; None where the sequential mode did not draw."""
    magnitude: float
    """|D|, L2 norm of all that the text adds at the first step (Wen et al.); of the first seed
    beside a residual score, which leaves out what control prompts add as well."""
    magnitude_per_element: float
    """`magnitude` over the square root of the number of latent elements."""
    collapse: float | None
    """Of a prompt suspicious enough for the second stage: the spatial variance of the mean of three
    quick images over the variance between them."""
    p_value: float
    """Share of controls that score at least as high (with the usual + 1)."""
    q_value: float
    """`p_value` after Benjamini-Hochberg over the audited prompts."""
    memorized: bool
    """`score`, or with a second stage the evidence of score and collapse, is above its calibrated
    threshold."""
    near: NearPrompt | None
    """Of a flagged prompt that is near a memorized one; None for all that stand for themselves."""
    explanation: WordSignificance | None
    images: tuple[GeneratedImage, ...]
    map: str | None
    """Score-difference map over the first image, relative path."""

    @property
    def copied(self) -> bool:
        """Return whether an image drawn for the prompt is a copy of a training image."""
        return any(image.nearest is not None and image.nearest.copied for image in self.images)

    def to_json(self) -> str:
        """Return the line of results.jsonl."""
        return dumps({"schema_version": SCHEMA_VERSION, **asdict(self)})


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """Everything a report shows."""

    config: AuditConfig
    model: ModelInfo
    calibration: Calibration
    entries: tuple[AuditEntry, ...]
    """In the order of the prompts."""
    summary: dict[str, Any]
    """As written to summary.json."""
    folder: Path
    open: tuple[str, ...] = ()
    """Sentences on what is not known yet; empty of a finished audit."""

    @property
    def found(self) -> bool:
        """Return whether a prompt is above the threshold, or an image of one is a copy."""
        return self.summary["verdict"] == "found"

    @property
    def flagged(self) -> list[AuditEntry]:
        """Return the memorized prompts, highest score first."""
        hits = [entry for entry in self.entries if entry.memorized]
        return sorted(hits, key=lambda entry: (-entry.score, entry.index))

    @property
    def families(self) -> list[AuditEntry]:
        """Return `flagged` with the near ones behind the prompt that they are near to."""
        family: dict[int, list[AuditEntry]] = {}
        for entry in self.flagged:
            family.setdefault(entry.near.index if entry.near else entry.index, []).append(entry)
        members = [entry for entry in self.flagged if entry.near is None]
        return [
            entry
            for member in members
            for entry in (member, *(e for e in family[member.index] if e is not member))
        ]


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
    """Return summary.json: counts and rates, how certain they are, and the conditions."""
    from scipy.stats import binomtest

    flagged = [entry for entry in entries if entry.memorized]
    near = sum(entry.near is not None for entry in entries)
    copied = sum(entry.copied for entry in entries)
    chance = calibration.false_positive_rate
    return {
        "schema_version": SCHEMA_VERSION,
        "unmemorize": versions()["unmemorize"],
        "verdict": "found" if flagged or copied else "nothing_found",
        "counts": {
            "prompts": len(entries),
            "prompts_read": inputs.prompts.read,
            "duplicates_merged": inputs.prompts.duplicates,
            "empty_dropped": inputs.prompts.empty,
            "cut": sum(bool(entry.cut) for entry in entries),
            "flagged": len(flagged),
            "near": near,
            "copied": copied,
            "controls": len(calibration.control_scores),
            "explained": sum(entry.explanation is not None for entry in entries),
            "images": sum(len(entry.images) for entry in entries),
        },
        "flagged_rate": rate(len(flagged), len(entries)),
        "near_rate": rate(near, len(entries)),
        "expected_by_chance": chance * len(entries),
        # Probability of at least so many flags if no prompt were memorized.
        "chance_p_value": float(
            binomtest(len(flagged), len(entries), chance, alternative="greater").pvalue
        ),
        "groups": _groups(entries),
        "calibration": {
            "name": calibration.controls,
            "score": calibration.settings.get("score", "magnitude"),
            "n": len(calibration.control_scores),
            "threshold": calibration.threshold,
            "false_positive_rate": chance,
            "interval": list(calibration.interval),
            "family_cosine": calibration.family_cosine,
            "confidence": CONFIDENCE,
            "second_stage": _second_stage(config, calibration, entries),
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
        "collapse": config.collapse,
        "score": measured_score(config.score, config.detection),
        "false_positive_rate": config.false_positive_rate,
        "explain": config.explain,
        "flagged_pictured": config.flagged_pictured,
        "images_per_prompt": config.images_per_prompt,
        "sample": config.sample,
        "generation_steps": config.generation_steps,
    }


def _second_stage(
    config: AuditConfig, calibration: Calibration, entries: Sequence[AuditEntry]
) -> dict[str, Any] | None:
    if not config.collapse:
        return None
    second = calibration.require_second()
    return {
        "suspicion": second.suspicion,
        "sampled": sum(entry.collapse is not None for entry in entries),
        "controls_sampled": len(second.control_evidence),
        "threshold": second.threshold,
    }


def _groups(entries: Sequence[AuditEntry]) -> dict[str, Any]:
    names = dict.fromkeys(entry.group for entry in entries if entry.group)
    members = {name: [e for e in entries if e.group == name] for name in names}
    return {
        name: (rate(sum(e.memorized for e in group), len(group)) or {})
        | {"near": sum(e.near is not None for e in group)}
        for name, group in members.items()
    }


def _warnings(inputs: Inputs, entries: Sequence[AuditEntry]) -> list[str]:
    warnings = []
    if empty := inputs.prompts.empty:
        warnings.append(f"{counted(empty, 'empty prompt was', 'empty prompts were')} left out.")
    if duplicates := inputs.prompts.duplicates:
        were = counted(duplicates, "repeated prompt was", "repeated prompts were")
        warnings.append(f"{were} merged with {'its' if duplicates == 1 else 'their'} first.")
    if shared := len(set(inputs.prompts.prompts) & set(inputs.controls)):
        are = counted(shared, "control prompt is", "control prompts are")
        warnings.append(f"{are} audited as well: the threshold may be too high.")
    for entry in entries:
        if n := len(entry.cut.split()):
            warnings.append(
                f"Prompt {entry.index} is too long for the text encoder: its last "
                f"{'word is' if n == 1 else f'{n} words are'} not read, from {entry.cut[:40]!r} on."
            )
    return warnings
