"""The settings of an audit of a LoRA, how they name its job, and how its report repeats them."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import demo
from ...shared.score.config import DetectionConfig
from ..common.job import content_key
from ..common.result import versions
from ..common.subject import Facts, Subject
from .result import TrainingSet

LEAST = {
    "captions": 1, "images_per_prompt": 1, "attack_images": 0, "generation_steps": 1,
    "batch_size": 1, "processes": 1,
}  # fmt: skip
"""Smallest value of each number."""
DECIDING = (
    "captions", "images_per_prompt", "attack_images", "generation_steps", "cond_scale",
    "batch_size", "reserve", "strength",
)  # fmt: skip
"""Settings that move the result and are plain numbers."""
OPTIONS = (
    "strength", "captions", "reserve", "instance_prompt", "trigger", "images_per_prompt",
    "generation_steps", "batch_size", "revision", "resolution", "frames", "dtype", "quantize",
)  # fmt: skip
"""Settings that are options of the same name."""
SHARE, POWER = 1 / 3, 0.8
"""An image that comes back from such a share of the seeds is to be found so surely."""


def power_of(seeds: int) -> float:
    """Return the probability that one of so many seeds brings an image that a `SHARE` brings."""
    return 1 - (1 - SHARE) ** seeds


SEEDS = math.ceil(math.log(1 - POWER) / math.log(1 - SHARE))
"""Seeds of a caption, as few as reach `POWER`."""


@dataclass(frozen=True, kw_only=True)
class LoraAuditConfig:
    """Which LoRA to audit, how hard to look, and where to write."""

    lora: Path
    images: Path
    """The folder it was trained on."""
    strength: float = 1.0
    """Factor of the LoRA's scale, as people use it; 1 is what was trained."""
    prompts: tuple[Path, ...] = ()
    """Files of further prompts, such as the examples on the LoRA's page."""
    quick: bool = False
    """Ask the captions alone; a later audit without it continues."""
    model: str = demo.NAME
    """Base model: diffusers folder, .safetensors checkpoint, hub id, `demo` or `demo-flow`."""
    revision: str | None = None
    """Of a hub id."""
    model_config: Path | None = None
    """Diffusers folder that a single-file checkpoint takes its configuration from."""
    resolution: int | None = None
    """Side of the images in pixels; None for what the model was made for."""
    frames: int | None = None
    """Of a clip; None for as many as a video model makes by itself, and for images."""
    held_out: Path | None = None
    """Folder of images of the same subject that were not trained on: the strictest controls."""
    reserve: float = 0.0
    """Share of `images` that was left out of the training, 0 to 1."""
    instance_prompt: str | None = None
    """The words that images without a caption were trained with."""
    trigger: str | None = None
    """The word that stands for what is taught; None: read from folder and file."""
    epochs: tuple[Path, ...] = ()
    """Files of saved epochs, or folders of them."""
    captions: int = 100
    """At most so many captions are prompts, most often repeated images first."""
    images_per_prompt: int = SEEDS
    """Images of each caption, as many again without the LoRA."""
    attack_images: int = 4
    """Images of each caption in the extraction attack; 0 leaves it out."""
    generation_steps: int = 20
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
    """float32, float16 or bfloat16; None: float32 on a processor, on a GPU as the family needs."""
    offload: str | None = None
    """model, sequential or group: weights rest in memory and come to the GPU while they compute."""
    quantize: str | None = None
    """nf4, int8 or float8: the network's weights have so few bits."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if not (math.isfinite(self.strength) and self.strength):
            raise ValueError(
                f"`strength` must be a number other than 0, got {self.strength}: at 0 there is no "
                "LoRA to audit."
            )
        if not 0 <= self.reserve < 1:
            raise ValueError(f"`reserve` must be at least 0 and below 1, got {self.reserve}.")
        if self.held_out and self.reserve:
            raise ValueError("Give `held_out` or `reserve`, not both.")


def identity_of(
    config: LoraAuditConfig,
    training: TrainingSet,
    epochs: Sequence[str],
    subject: Subject,
    features: str,
    prompts: Sequence[str] = (),
) -> dict[str, Any]:
    """Return everything that decides the results; equal identities may share a folder.

    `epochs` are the sha256 of saved ones, `features` names the encoder with its weights' hash,
    `prompts` are those besides the captions. A quick audit is the beginning of one that is not.
    """
    images = [(image.name, image.sha256, image.caption, image.repeats, image.held_out)
              for image in training.images]  # fmt: skip
    return {
        "model and LoRA": subject.fingerprint,
        "device": subject.device.split(":")[0],
        "dtype": subject.dtype,
        "resolution": subject.resolution,
        **({} if subject.frames is None else {"frames": subject.frames}),
        "training images": content_key(images),
        "trigger": training.trigger,
        "epochs": list(epochs),
        "seeds": list(config.detection.seeds),
        "features": features,
        "prompts": content_key(list(prompts)),
        **{name: getattr(config, name) for name in DECIDING},
        **{f"version of {name}": number for name, number in versions().items()},
    }


def settings_of(
    config: LoraAuditConfig, facts: Facts, features: str
) -> tuple[tuple[str, str], ...]:
    """Return name and value of everything a reader needs to get the same again."""
    return (
        ("command", _command(config)),
        *((name.replace("_", " "), str(getattr(config, name))) for name in DECIDING),
        ("score seeds", ", ".join(map(str, config.detection.seeds))),
        ("dtype", facts.info.dtype),
        ("device", facts.info.device.split(":")[0]),
        ("features", features),
        *((f"version of {name}", number) for name, number in versions().items()),
    )


def _command(config: LoraAuditConfig) -> str:
    """Return what to type, with names of files and folders in place of their paths."""
    usual = LoraAuditConfig(lora=config.lora, images=config.images)
    model = Path(config.model).name if Path(config.model).exists() else config.model
    named = [
        ("lora", config.lora), ("images", config.images), ("held-out", config.held_out),
        ("model-config", config.model_config), *(("epochs", path) for path in config.epochs),
        *(("prompts", path) for path in config.prompts),
    ]  # fmt: skip
    words = ["unmemorize", "audit", model]
    for option, path in named:
        words += [f"--{option}", path.resolve().name] if path else []
    detection = config.detection
    if len(detection.seeds) != len(usual.detection.seeds):
        words += ["--seeds", str(len(detection.seeds))]
    if detection.steps != usual.detection.steps:
        words += ["--steps", str(detection.steps)]
    for name in OPTIONS:
        if (value := getattr(config, name)) != getattr(usual, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += [] if config.attack_images else ["--no-attack"]
    words += ["--quick"] if config.quick else []
    words += ["--include-images"] if config.include_images else []
    return shlex.join(words)
