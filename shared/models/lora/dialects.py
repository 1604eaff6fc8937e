"""How LoRA files spell their keys, and the translation of those that only diffusers knows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files.weights import ModelError
from ...wording import counted, name_some
from .peft_config import MERGE

FACTORS = (
    (".lora_down.weight", ".lora_up.weight"),  # kohya
    (".lora_A.weight", ".lora_B.weight"),  # PEFT, and diffusers since 0.22
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),  # diffusers, text encoder
    ("_lora.down.weight", "_lora.up.weight"),  # diffusers, attention processors
    (".lora.down.weight", ".lora.up.weight"),
)
"""Endings of the keys of the factors A and B, per dialect."""
MAGNITUDES = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight",
              ".lora_magnitude_vector.default.weight")  # fmt: skip
"""Endings of the key of a DoRA's magnitudes: LyCORIS, then PEFT and diffusers."""
ENDINGS = {
    **{end: factor for ends in FACTORS for end, factor in zip(ends, "AB", strict=True)},
    **dict.fromkeys(MAGNITUDES, "magnitude"),
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
}
PEFT_PREFIX = "base_model.model."
EMBEDDING = "bundle_emb."
"""How the keys of embeddings begin that OneTrainer puts into the LoRA's file."""
NO_LORA = {
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "magnitude_vector": "DoRA",
    "oft_blocks": "OFT", ".on_input": "(IA)3", ".diff": "full change", ".w_norm": "norm",
}  # fmt: skip
"""Parametrizations that are no pair of factors, by a mark in their keys."""


def split_key(key: str) -> tuple[str, str] | None:
    """Return the module that a key belongs to and which of its tensors it names.

    The tensor is "A", "B", "alpha", "mid" (the core of LoCon's Tucker form), "magnitude" (DoRA),
    or a factor of LoHa (``hada_...``) or LoKr (``lokr_...``). None for all other keys.
    """
    for end, tensor in ENDINGS.items():
        if key.endswith(end):
            return key.removesuffix(end), tensor
    module, _, factor = key.rpartition(".")
    return (module, factor) if factor.startswith(("hada_", "lokr_")) else None


def check_pairs(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ModelError unless every key belongs to a module that has both factors, A and B."""
    for mark, method in NO_LORA.items():
        if keys := [key for key in state if mark in key]:
            raise ModelError(
                f"{path} is a {method}, not a LoRA ({counted(len(keys), 'key', 'keys')} such as "
                f"{keys[0]}). {MERGE}"
            )
    modules: dict[str, set[str]] = {}
    unknown = []
    for key in state:
        module, tensor = split_key(key) or ("", "")
        if tensor in ("A", "B", "alpha"):
            modules.setdefault(module, set()).add(tensor)
        else:
            unknown.append(key)
    if unknown or not modules:
        faults = counted(len(unknown), "key is not a factor", "keys are not factors")
        raise ModelError(
            f"{path} is not a LoRA that can be read: {faults} of a module (of {len(state)}): "
            f"{name_some(unknown) or 'the file is empty'}. A whole model is given as MODEL, not as "
            "--lora."
        )
    factors = {module: tensors - {"alpha"} for module, tensors in modules.items()}
    if lone := [f"{module} ({'only ' + has.pop() if has else 'no factor'})"
                for module, has in factors.items() if len(has) < 2]:  # fmt: skip
        raise ModelError(
            f"{path}: {counted(len(lone), 'module lacks', 'modules lack')} a LoRA factor: "
            f"{name_some(lone)}. Is the file cut?"
        )


def take_embeddings(raw: dict[str, Tensor]) -> list[str]:
    """Take the embeddings out that OneTrainer bundles with a LoRA; return their names."""
    keys = [key for key in raw if key.startswith(EMBEDDING)]
    for key in keys:
        del raw[key]
    return sorted({key.removeprefix(EMBEDDING).rpartition(".")[0] for key in keys})


def by_diffusers(pipeline: Any, raw: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return a state dict without alphas in the dialect of diffusers, by its own converters.

    Raises:
        ModelError: They do not know the keys.
    """
    reader = getattr(pipeline, "lora_state_dict", None)
    try:
        if reader is None:
            raise ValueError("diffusers reads no LoRA for this pipeline")
        unet = getattr(pipeline, "unet", None)
        # By its configuration Stability AI's blocks are counted. Converters take keys out.
        out = reader(dict(raw), **({} if unet is None else {"unet_config": unet.config}))
    except (ValueError, KeyError, RuntimeError, IndexError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{path} does not fit a {type(pipeline).__name__}: "
            f"{counted(len(raw), 'key', 'keys')} such as {name_some(raw, 2)} name no layer of it "
            f"({str(error)[:200]}). Is it a LoRA for another architecture?"
        ) from error
    return out[0] if isinstance(out, tuple) else out
