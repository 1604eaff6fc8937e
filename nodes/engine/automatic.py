"""A calibration that a node makes by itself, kept in ComfyUI's user folder and found again there.

It is bound to the weights, the size of the latents, the noise levels and the negative: its file is
named after all of them, so that nothing but what fits is ever found.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ...shared.score.calibration import SCHEMA_VERSION, Calibration, CalibrationError
from ...shared.score.config import DetectionConfig
from ...shared.score.control_basis import told_steps
from ...shared.score.controls import CONTROLS, load_controls, spread
from .calibrations import calibrate
from .comfy_denoiser import noise_levels, parametrization_of
from .measuring import ROWS, encoded, latent_shape
from .model_identity import digest, weights_sha256

CONFIG = DetectionConfig(seeds=(0, 1), batch_size=ROWS)
"""Both told levels, one starting noise each: twice as many noises find hardly more."""
RATE = 0.01
NUMBER = 100
"""Controls: the fewest that support `RATE` are 99."""
OWN_CONTROLS = "unmemorize controls"
"""Attachment of a MODEL that knows ordinary prompts of its own kind: a tuple of texts."""
NAME = "photographs and art"
MAKE_ONE = (
    "No calibration is connected, and none was made by itself for this model, size and negative. "
    "Put Memorization Check in front with the same negative, which makes one on first use; or "
    "connect Calibrate or Load Calibration."
)


def automatic(
    model: ModelPatcher, clip: Any, negative: list, latent: Mapping[str, Any]
) -> Calibration:
    """Return the calibration of this model; the first time it is made, which shows its progress.

    Args:
        model: MODEL.
        clip: CLIP that encodes the controls.
        negative: CONDITIONING that scores are measured against.
        latent: LATENT of the size to measure at.
    """
    against = [text for text, _ in negative]
    if not any(bool(text.any()) for text in against):  # which of no text encoder tells anything
        against += [text for text, _ in encoded(clip, "")]
    path = path_of(model, against, latent_shape(model, latent))
    if (known := _read(path)) is not None:
        return known
    own = model.attachments.get(OWN_CONTROLS)
    prompts = own or [
        text for name in CONTROLS for text in spread(load_controls(name), NUMBER // 2)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    return calibrate(
        model, clip, prompts, negative, latent, CONFIG,
        controls="captions of this model" if own else NAME, false_positive_rate=RATE, path=path,
    )  # fmt: skip


def found(
    model: ModelPatcher, negative: Sequence[torch.Tensor], shape: tuple[int, ...]
) -> Calibration | None:
    """Return the calibration that `automatic` has made of this model, None where it has not.

    Args:
        model: MODEL.
        negative: Embeddings [1 token width] of the CONDITIONING that scores are measured against.
        shape: Of one latent.
    """
    if not any(bool(text.any()) for text in negative):
        return None  # zeros: the same of every text encoder, so that it could be another's
    return _read(path_of(model, negative, shape))


def path_of(model: ModelPatcher, negative: Sequence[torch.Tensor], shape: tuple[int, ...]) -> Path:
    """Return the file of the automatic calibration, there or not; arguments as of `found`."""
    sampling = model.get_model_object("model_sampling")
    levels = noise_levels(sampling, CONFIG.schedule_steps)
    told = told_steps(len(CONFIG.seeds), CONFIG.schedule_steps)
    network = model.model
    bound = [
        SCHEMA_VERSION, NUMBER, shape, [float(f"{levels[step]:.5g}") for step in (0, *told)],
        str(network.manual_cast_dtype or network.get_dtype()), list(negative),
        parametrization_of(sampling), _patched(model),
    ]  # fmt: skip
    folder = Path(folder_paths.get_user_directory()) / "unmemorize"
    return folder / f"{weights_sha256(model)[:16]}-{digest(bound)[:16]}.json"


def _patched(model: ModelPatcher) -> list[str]:
    """Return the names of the patches on attention and blocks, which no weight shows."""
    options = model.model_options.get("transformer_options", {})
    names = []
    for kind in ("patches", "patches_replace"):
        for place, its in options.get(kind, {}).items():
            functions = its.values() if isinstance(its, Mapping) else its
            names += [f"{kind} {place} {getattr(f, '__qualname__', type(f).__qualname__)}"
                      for f in functions]  # fmt: skip
    return sorted(names)


def _read(path: Path) -> Calibration | None:
    """Return what is saved there; None where nothing is, or what is damaged."""
    if not path.is_file():
        return None
    try:
        return Calibration.load(path)
    except CalibrationError:
        return None  # it is made anew, which costs a minute
