"""What kind of LoRA a file is, told by the names and shapes in it; no weight is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...shared.files.weights import ModelError, read_header
from ...shared.models.lora.dialects import FACTORS, MAGNITUDES, PEFT_PREFIX
from ...shared.wording import counted

Dialect = Literal["kohya", "peft", "diffusers", "lycoris"]
PARTS = ("unet.", "transformer.", "text_encoder")
"""How diffusers' keys begin."""
PRODUCTS = {"hada_": "loha", "lokr_": "lokr"}
"""Kind by the start of a factor's name."""
DOWN = tuple(down for down, _ in FACTORS)
INNER = (*DOWN, ".hada_w1_b", ".lokr_w2_b", ".lokr_w1_b")
"""Endings of factors whose first dimension is the rank."""
READS_TEXT = ("attn2_to_k", "attn2.to_k")
"""Layers whose inputs are the text's embeddings."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a LoRA file is made of."""

    dialect: Dialect
    kinds: tuple[str, ...]
    rank: int | None
    """The largest."""
    modules: int
    text_width: int | None
    """Of the embeddings that its network reads; None where no module tells."""


def kind_of(path: Path) -> Kind:
    """Return what a LoRA file is made of.

    Raises:
        ModelError: It is missing, a pickle, cut off, not safetensors, or no LoRA.
    """
    shapes = {key: shape for key, (_, shape) in read_header(path).items()}
    modules: dict[str, str] = {}
    for key, shape in shapes.items():
        if end := next((end for end in DOWN if key.endswith(end)), None):
            stem = key.removesuffix(end)
            whole = f"{stem}.lora_mid.weight" in shapes or any(side > 1 for side in shape[2:])
            modules.setdefault(stem, "locon" if whole else "lora")
        elif end := next((end for end in MAGNITUDES if key.endswith(end)), None):
            modules[key.removesuffix(end)] = "dora"
        else:
            stem, _, factor = key.rpartition(".")
            if product := PRODUCTS.get(factor[:5]):
                modules.setdefault(stem, product)
    if not modules:
        raise ModelError(
            f"{path} is no LoRA: it holds {counted(len(shapes), 'key', 'keys')} and no factor of "
            "one. A whole model is given as MODEL, not as --lora."
        )
    ranks = [shape[0] for key, shape in shapes.items() if key.endswith(INNER) and shape]
    return Kind(
        dialect=_dialect(shapes),
        kinds=tuple(sorted(set(modules.values()))),
        rank=max(ranks, default=None),
        modules=len(modules),
        text_width=_text_width(shapes),
    )


def _dialect(shapes: Mapping[str, tuple[int, ...]]) -> Dialect:
    """Return who writes keys like these."""
    if any(key.startswith(PEFT_PREFIX) for key in shapes):
        return "peft"
    if any(key.startswith(PARTS) for key in shapes):
        return "diffusers"
    marks = (".hada_", ".lokr_", ".lora_mid.", MAGNITUDES[0])
    return "lycoris" if any(mark in key for key in shapes for mark in marks) else "kohya"


def _text_width(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return how many numbers a token has where the file's modules read it."""
    return next(
        (
            shape[1]
            for key, shape in shapes.items()
            if any(layer in key for layer in READS_TEXT)
            and key.endswith((*DOWN, ".hada_w1_b"))
            and len(shape) > 1
        ),
        None,
    )
