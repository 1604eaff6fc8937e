"""What a guard decided and measured, image by image."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class GuardedImage:
    """One image of a run: what was decided and measured."""

    prompt: str | None
    """None when embeddings were given instead."""
    fired: bool
    """The method acted on this image."""
    threshold: float | None
    """Of the gate (L2 norm, latent units); None without a calibration."""
    score_before: float | None
    """Of the prompt, by the gate's probe; None without a calibration."""
    score_after: float | None = None
    """The same probe of the conditioning the method put in its place. None where it left that
    alone: a method that acts on steps or on the noise does not change what a prompt scores."""
    noise_before: float | None = None
    """|D| at this image's own initial noise, brought to the level of the probe, when the method
    replaced it. Of one noise, so not to be compared with the threshold."""
    noise_after: float | None = None
    """|D| at the noise the method put in its place, with the conditioning of the run."""
    method: str | None = None
    """Name of the method; None when it did not act."""


@dataclass(kw_only=True)
class GuardedRun:
    """One call of the pipeline."""

    images: tuple[GuardedImage, ...] = ()
    """In order; empty when the pipeline stopped before its first step."""


@dataclass(kw_only=True)
class GuardRecord:
    """What the guard did, in order."""

    runs: list[GuardedRun] = field(default_factory=list)
    caveat: str = ""
    """Why the calibration need not hold here, when it was forced; print it with the scores."""
