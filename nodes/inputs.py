"""What several nodes have in common: their schema, their inputs, and what these say."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comfy_api.latest import io

from ..shared.arrays import Float, Tensor
from ..shared.mitigation.gate import Gate
from ..shared.score.calibration import Calibration
from ..shared.score.config import DetectionConfig
from .engine.automatic import MAKE_ONE
from .engine.measuring import ROWS

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT = Path(__file__).resolve().parents[1]
CATEGORY = "unmemorize"
TEXTS = json.loads((ROOT / "locales/en/nodeDefs.json").read_text("utf-8"))
"""English names and tooltips by node id."""
CalibrationSocket = io.Custom("UNMEMORIZE_CALIBRATION")
"""Socket that carries a `Calibration`."""
RecordSocket = io.Custom("UNMEMORIZE_RECORD")
"""Socket that carries a `WatchRecord`."""
GATES = {"auto": "calibrated", "always": "always", "never": "never"}
"""Modes of the gate by what the widget calls them."""
TARGETS = ("calibration", "norm")
SUBJECTS = ("copyright", "duplicate", "overfit", "plagiarism")
"""Words that a search finds every node of the pack by."""
ADVANCED = frozenset({
    "seeds", "steps", "force", "save_score", "most", "false_positive_rate", "target_from",
    "target_quantile", "target_norm", "learning_rate", "iterations",
})  # fmt: skip
"""Widgets that are right as they are for a start: the page shows them when asked for."""


def schema(
    node_id: str, *, inputs: list, outputs: list, search_aliases: list[str], **settings: Any
) -> io.Schema:
    """Return a node's schema in the pack's category, its texts in English.

    Names, description and tooltips stand in locales/en/nodeDefs.json, beside their translations.

    Args:
        node_id: Key of the texts.
        inputs: Texts are filled in here; what the file does not name keeps its own.
        outputs: The same.
        search_aliases: Further words a search should find the node by; ComfyUI before 0.16 has no
            such field.
        settings: Fields that every supported ComfyUI knows.
    """
    texts = TEXTS[node_id]
    named = [(one, texts.get("inputs", {}).get(one.id)) for one in inputs]
    named += [(one, texts["outputs"][str(place)]) for place, one in enumerate(outputs)]
    for one, text in named:
        if text:
            one.tooltip = text["tooltip"]
            if text["name"] != one.id:
                one.display_name = text["name"]
    for one in inputs:
        if one.id in ADVANCED and hasattr(one, "advanced"):  # ComfyUI before 0.16 has no such
            one.advanced = True
    if "search_aliases" in {field.name for field in fields(io.Schema)}:
        settings["search_aliases"] = list(dict.fromkeys([*search_aliases, *SUBJECTS]))
    return io.Schema(
        node_id=node_id, display_name=texts["display_name"], description=texts["description"],
        category=CATEGORY, inputs=inputs, outputs=outputs, **settings,
    )  # fmt: skip


def to_image(drawn: "Image") -> Float[Tensor, " 1 height width 3"]:
    """Return an RGB image of Pillow as an IMAGE batch of one, 0..1."""
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32) / 255)[None]


def seed_inputs(seeds: int = 4) -> list[io.Int.Input]:
    """Return the inputs of `config_of`; `seeds` is the default of the first."""
    return [
        io.Int.Input("seeds", default=seeds, min=1, max=64),
        io.Int.Input("steps", default=1, min=1, max=50),
    ]


def config_of(seeds: int, steps: int) -> DetectionConfig:
    """Return what the widgets of `seed_inputs` say."""
    return DetectionConfig(seeds=tuple(range(seeds)), steps=steps, batch_size=ROWS)


def gate_of(choice: str, calibration: Calibration | None) -> Gate:
    """Return the gate that the widget chose.

    Raises:
        ValueError: It would have nothing to decide by.
    """
    if choice == "auto" and calibration is None:
        raise ValueError(f"The gate auto needs a calibration. {MAKE_ONE} Or set it to always.")
    return Gate(mode=GATES[choice], calibration=calibration)


def target_inputs(targets: Sequence[str] = TARGETS, **settings: Any) -> list:
    """Return the inputs of the score at which a search may stop; `settings` go to each."""
    return [
        io.Combo.Input(
            "target_from",
            options=list(targets),
            default=targets[0],
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
