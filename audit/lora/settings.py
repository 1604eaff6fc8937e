"""All that decides the result of an audit: what names its job, and what its report says."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common.job import content_key
from ..common.result import versions
from ..common.subject import Facts, Subject
from .config import LoraAuditConfig
from .epochs import Epoch
from .result import TrainingSet

DECIDING = (
    "captions", "images_per_prompt", "attack_images", "generation_steps", "cond_scale",
    "batch_size", "reserve",
)  # fmt: skip
"""Settings of `LoraAuditConfig` that move the result and are plain numbers."""
OPTIONS = (
    "reserve", "trigger", "images_per_prompt", "generation_steps", "batch_size", "revision",
    "resolution", "dtype",
)  # fmt: skip
"""Settings that are options of the same name."""


def identity_of(
    config: LoraAuditConfig,
    training: TrainingSet,
    epochs: Sequence[Epoch],
    subject: Subject,
    features: str,
) -> dict[str, Any]:
    """Return all that decides the results; equal identities may share a folder."""
    images = [(image.name, image.sha256, image.caption, image.repeats, image.held_out)
              for image in training.images]  # fmt: skip
    return {
        "model and LoRA": subject.fingerprint,
        "device": subject.device.split(":")[0],
        "dtype": subject.dtype,
        "resolution": subject.resolution,
        "training images": content_key(images),
        "trigger": training.trigger,
        "epochs": [epoch.sha256 for epoch in epochs],
        "seeds": list(config.detection.seeds),
        "features": features,
        **{name: getattr(config, name) for name in DECIDING},
        **{f"version of {name}": number for name, number in versions().items()},
    }


def settings_of(
    config: LoraAuditConfig, facts: Facts, features: str
) -> tuple[tuple[str, str], ...]:
    """Return name and value of everything a reader needs to get the same again."""
    info = asdict(facts.info)
    return (
        ("command", _command(config)),
        *((name.replace("_", " "), str(getattr(config, name))) for name in DECIDING),
        ("score seeds", ", ".join(map(str, config.detection.seeds))),
        ("dtype", info["dtype"]),
        ("device", info["device"].split(":")[0]),
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
    words += ["--include-images"] if config.include_images else []
    return shlex.join(words)
