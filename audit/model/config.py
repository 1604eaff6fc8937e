"""The settings of an audit."""

from dataclasses import dataclass, field
from pathlib import Path

from ... import demo
from ...shared.score.config import DetectionConfig

SCORES = ("residual", "magnitude")


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What to audit, how hard to look, and where to write."""

    model: str = demo.NAME
    """Diffusers folder, single-file .safetensors checkpoint, hub id, `demo` or `demo-flow`."""
    lora: Path | None = None
    strength: float = 1.0
    """Of the LoRA, as it will be used; 1 is as it was trained."""
    revision: str | None = None
    """Of a hub id."""
    model_config: Path | None = None
    """Diffusers folder that a single-file checkpoint takes its configuration from."""
    resolution: int | None = None
    """Side of the images in pixels; None for what the model was made for."""
    prompts: tuple[Path, ...] = ()
    """Files or training folders; none means the demo's own captions."""
    controls: str = ""
    """`photographs`, `art`, `demo`, or a file of ordinary prompts. Empty: chosen for the model."""
    calibration: Path | None = None
    """A calibration made earlier; `controls` are then not run."""
    force: bool = False
    """Use a calibration of another model or setting; the result says so."""
    output: Path = Path("unmemorize-audit")
    overwrite: bool = False
    """Replace the files of another audit in `output`."""
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    score: str | None = None
    """What prompts are judged by: `residual`, what lies outside of what the controls add, or
    `magnitude`, all that a prompt adds (Wen et al.). None: residual, but magnitude of several
    steps, which a residual does not have."""
    sequential: bool = False
    """Stop drawing seeds for a prompt once its verdict is settled."""
    collapse: bool = False
    """Sample the most suspicious prompts, and judge them by score and collapse together."""
    false_positive_rate: float = 0.01
    """Share of ordinary prompts above the threshold, 0 to 1."""
    explain: int | None = None
    """At most so many flagged prompts are explained, highest score first; None: all."""
    flagged_pictured: int = 24
    """Flagged prompts that get images, highest score first."""
    images_per_prompt: int = 2
    """Images of each of them; 0 generates none at all."""
    sample: int = 8
    """Other prompts that get one image each, spread evenly over the rest."""
    generation_steps: int = 20
    """Sampling steps of an image."""
    device: str | None = None
    dtype: str | None = None
    """float32, float16 or bfloat16; None: float32 on a processor, on a GPU as the family needs."""
    offload: str | None = None
    """model, sequential or group: weights rest in memory and come to the GPU while they compute."""
    quantize: str | None = None
    """nf4, int8 or float8: the network's weights have so few bits."""

    def __post_init__(self) -> None:
        if not 0 < self.false_positive_rate < 1:
            raise ValueError(
                "`false_positive_rate` must lie between 0 and 1, "
                f"got {self.false_positive_rate}. 0.01 flags one ordinary prompt in a hundred."
            )
        measured_score(self.score, self.detection)
        for name in ("flagged_pictured", "images_per_prompt", "sample", "explain"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        if self.generation_steps < 1:
            raise ValueError(f"`generation_steps` must be at least 1, got {self.generation_steps}.")


def measured_score(score: str | None, detection: DetectionConfig) -> str:
    """Return what prompts are judged by, "residual" or "magnitude".

    Raises:
        ValueError: There is no such score, or a residual was asked for of several steps.
    """
    if score not in (None, *SCORES):
        raise ValueError(f"`score` must be one of {', '.join(SCORES)}, got {score!r}.")
    if score == "residual" and detection.steps > 1:
        raise ValueError(
            f"A residual is measured at one step, got {detection.steps}. Leave --steps out, or "
            "choose --score magnitude."
        )
    return score or ("magnitude" if detection.steps > 1 else "residual")
