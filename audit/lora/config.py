"""The settings of an audit of a LoRA."""

from dataclasses import dataclass, field
from pathlib import Path

from ...shared.score.detection import DetectionConfig
from ..common.subject import DEMO

LEAST = {
    "captions": 1, "images_per_prompt": 1, "attack_images": 0, "generation_steps": 1,
    "batch_size": 1, "processes": 1,
}  # fmt: skip
"""Smallest value of each number."""


@dataclass(frozen=True, kw_only=True)
class LoraAuditConfig:
    """Which LoRA to audit, how hard to look, and where to write."""

    lora: Path
    images: Path
    """The folder it was trained on."""
    model: str = DEMO
    """Base model: diffusers folder, single-file .safetensors checkpoint, hub id, or `demo`."""
    revision: str | None = None
    """Of a hub id."""
    model_config: Path | None = None
    """Diffusers folder that a single-file checkpoint takes its configuration from."""
    resolution: int | None = None
    """Side of the images in pixels; None for what the model was made for."""
    held_out: Path | None = None
    """Folder of images of the same subject that were not trained on: the strictest controls."""
    reserve: float = 0.0
    """Share of `images` that was left out of the training, 0 to 1."""
    trigger: str | None = None
    """The word that stands for what is taught; None: read from folder and file."""
    epochs: tuple[Path, ...] = ()
    """Files of saved epochs, or folders of them."""
    captions: int = 100
    """At most so many captions are asked, most often repeated images first."""
    images_per_prompt: int = 2
    """Images of each caption, as many again without the LoRA."""
    attack_images: int = 4
    """Images of each caption in the extraction attack; 0 leaves it out."""
    generation_steps: int = 30
    """Sampling steps of an image."""
    cond_scale: float = 5.0
    """Guidance of ordinary images; much more bends the colours away from what was trained."""
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    """How scores are measured."""
    batch_size: int = 4
    """Images that are sampled at once; another number may move their last digits."""
    processes: int = 1
    """Processes that images are spread over; on GPUs each takes one."""
    include_images: bool = False
    """Show training images in the page as they are."""
    output: Path = Path("unmemorize-lora-audit")
    overwrite: bool = False
    """Replace the files of another audit in `output`."""
    device: str | None = None
    dtype: str | None = None
    """float32, float16 or bfloat16; None: float32 on a processor, float16 on a GPU."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"`reserve` must be at least 0 and below 1, got {self.reserve}.")
