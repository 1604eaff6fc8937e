"""What a calibration is bound to: the weights of a MODEL with its LoRA, and the settings."""

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...shared.score.calibration import settings_of
from ...shared.score.config import DetectionConfig
from .comfy_denoiser import ModelDenoiser

_known: "weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, str]]" = weakref.WeakKeyDictionary()


def weights_sha256(model: ModelPatcher) -> str:
    """Return the sha256 of the network's weights and of the patches on them, LoRA above all.

    The same on every device and whatever part is loaded: weights are read as they were before
    patching. Patches that are no weights (attention, guidance) are not seen. Cached.
    """
    known = _known.setdefault(model.model, {})
    if model.patches_uuid not in known:
        known[model.patches_uuid] = _weights_sha256(model)
    return known[model.patches_uuid]


def _weights_sha256(model: ModelPatcher) -> str:
    total = hashlib.sha256()
    for name, (weight, *patches) in sorted(model.get_key_patches("diffusion_model.").items()):
        total.update(name.encode())
        # Since 0.3 a weight comes with the function that undoes its storage format.
        _update(total, weight[0] if isinstance(weight, tuple) else weight)
        _update(total, patches)
    return total.hexdigest()


def _update(total: Any, value: Any) -> None:
    """Feed tensors by their bytes, containers and adapters by what they hold, others by name."""
    if isinstance(value, Tensor):
        total.update(f"{value.dtype}{tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, list | tuple):
        total.update(f"({len(value)}".encode())
        for part in value:
            _update(total, part)
    elif isinstance(value, dict):
        _update(total, sorted(value.items()))
    elif hasattr(value, "weights"):  # a LoRA and its like: its name, then what it multiplies
        _update(total, [type(value).__name__, value.weights])
    else:
        total.update(str(getattr(value, "__qualname__", value)).encode())


def settings(
    denoiser: ModelDenoiser, config: DetectionConfig, told: Sequence[int] | None = None
) -> dict:
    """Return what moves a score besides the weights: the negative is whatever is connected."""
    negative = digest(denoiser.unconditional().embeddings)[:16]
    return settings_of(denoiser, config, told) | {"negative": negative}


def digest_of_negative(conds: Sequence[Mapping[str, Any]]) -> str:
    """Return what `settings` says of a negative that ComfyUI has prepared, "" where it has none."""
    cross = conds[0]["model_conds"].get("c_crossattn") if conds else None
    return "" if cross is None else digest(cross.cond[:1])[:16]


def digest(value: Any) -> str:
    """Return the sha256 of tensors, numbers and texts in containers."""
    total = hashlib.sha256()
    _update(total, value)
    return total.hexdigest()
