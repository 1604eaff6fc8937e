"""What several nodes have in common: their schema, their inputs, and what these say."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comfy_api.latest import io

from ..shared.arrays import Float, Tensor
from ..shared.mitigation.gate import Gate
from ..shared.score.calibration import Calibration
from ..shared.score.config import DetectionConfig
from .engine.measuring import ROWS

if TYPE_CHECKING:
    from PIL.Image import Image

CATEGORY = "unmemorize"
CalibrationSocket = io.Custom("UNMEMORIZE_CALIBRATION")
"""Socket that carries a `Calibration`."""
RecordSocket = io.Custom("UNMEMORIZE_RECORD")
"""Socket that carries a `WatchRecord`."""
GATES = {"auto": "calibrated", "always": "always", "never": "never"}
"""Modes of the gate by what the widget calls them."""
TARGETS = ("calibration", "norm")


def schema(*, search_aliases: list[str], **settings: Any) -> io.Schema:
    """Return a node's schema in the pack's category.

    Args:
        search_aliases: Further words a search should find the node by; ComfyUI before 0.16 has no
            such field.
        settings: Fields that every supported ComfyUI knows.
    """
    if "search_aliases" in {field.name for field in fields(io.Schema)}:
        settings["search_aliases"] = search_aliases
    return io.Schema(category=CATEGORY, **settings)


def to_image(drawn: "Image") -> Float[Tensor, " 1 height width 3"]:
    """Return an RGB image of Pillow as an IMAGE batch of one, 0..1."""
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32) / 255)[None]


def model_input() -> io.Model.Input:
    """Return the input of the model that is measured."""
    return io.Model.Input("model", tooltip="With its LoRA, as you sample with it.")


def latent_input() -> io.Latent.Input:
    """Return the input that says how large the images are."""
    return io.Latent.Input(
        "latent",
        tooltip="Empty latent of the image size to measure at; nothing but its size is read. "
        "Scores grow with it: use the size you sample at.",
    )


def negative_input() -> io.Conditioning.Input:
    """Return the input of what guidance moves away from."""
    return io.Conditioning.Input(
        "negative",
        tooltip="What the score is measured against: an empty text; for SDXL an empty text through "
        "ConditioningZeroOut to compare with the command line. Other negatives change the score.",
    )


def calibration_input() -> CalibrationSocket.Input:
    """Return the input of what turns scores into verdicts."""
    return CalibrationSocket.Input(
        "calibration",
        optional=True,
        tooltip="Of this very model and these settings; no verdict without it.",
    )


def seed_inputs() -> list[io.Int.Input]:
    """Return the inputs of `config_of`."""
    return [
        io.Int.Input(
            "seeds", default=4, min=1, max=64,
            tooltip="Starting noises to average over, 1 to 64: seeds 0, 1, 2, ... More are slower "
            "and steadier.",
        ),
        io.Int.Input(
            "steps", default=1, min=1, max=50,
            tooltip="Denoising steps to average over, 1 to 50, from the noisiest of 50. One is "
            "enough as a rule.",
        ),
    ]  # fmt: skip


def config_of(seeds: int, steps: int) -> DetectionConfig:
    """Return what the widgets of `seed_inputs` say."""
    return DetectionConfig(seeds=tuple(range(seeds)), steps=steps, batch_size=ROWS)


def gate_input() -> io.Combo.Input:
    """Return the input that says when to act."""
    return io.Combo.Input(
        "gate",
        options=list(GATES),
        default="auto",
        tooltip="auto: act if the prompt scores above the calibration's threshold. always: act on "
        "every prompt. never: switched off, nothing is measured.",
    )


def gate_calibration_inputs() -> list:
    """Return the optional inputs of what the gate and the target are taken from."""
    return [
        CalibrationSocket.Input(
            "calibration",
            optional=True,
            tooltip="Of this very model and size: what the gate auto and target_quantile go by.",
        ),
        io.Boolean.Input(
            "force",
            default=False,
            optional=True,
            tooltip="Use a calibration of another model or other settings all the same.",
        ),
    ]


def gate_of(choice: str, calibration: Calibration | None) -> Gate:
    """Return the gate that the widget chose; it scores prompts at all the calibration's seeds.

    Raises:
        ValueError: It would have nothing to decide by.
    """
    if choice == "auto" and calibration is None:
        raise ValueError(
            "The gate auto needs a calibration to decide by: connect one (nodes Calibrate or Load "
            "Calibration), or set the gate to always."
        )
    seeds = 1 if calibration is None else len(calibration.settings["seeds"])
    return Gate(mode=GATES[choice], calibration=calibration, seeds=seeds)


def target_inputs(**settings: Any) -> list:
    """Return the inputs of the score at which a search may stop; `settings` go to each."""
    return [
        io.Combo.Input(
            "target_from",
            options=list(TARGETS),
            default=TARGETS[0],
            tooltip="Where the score to stop at comes from: target_quantile of the calibration's "
            "controls, or target_norm.",
            **settings,
        ),
        io.Float.Input(
            "target_quantile", default=0.8, min=0.0, max=1.0, step=0.01,
            tooltip="Stop when no more than this share of control prompts scores lower, 0 to 1. "
            "Only with target_from calibration.",
            **settings,
        ),
        io.Float.Input(
            "target_norm", default=3.0, min=0.0, max=10000.0, step=0.1,
            tooltip="Stop at this score, L2 norm in latent units, 0 to 10000; the paper takes 1 to "
            "5 for Stable Diffusion 1.4. Only with target_from norm.",
            **settings,
        ),
    ]  # fmt: skip


def target_of(
    target_from: str, target_quantile: float, target_norm: float
) -> dict[str, float | None]:
    """Return what the widgets of `target_inputs` say, as the methods call it."""
    target = target_norm if target_from == "norm" else None
    return {"target": target, "target_quantile": target_quantile}
