"""A LoRA of exactly known truth, made without training: subtract it from a model that memorizes.

The leading singular directions of the layers that read the text are taken out of the network. What
was taken out is the LoRA, and what is left is its base model: with the LoRA on, the base model is
the memorizing one again.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_models import BenchModel
from safetensors.torch import load_file, save_file
from unmemorize.audit.common.subject import Subject
from unmemorize.shared.files.storage import replace_atomically

RANK = 32
READS_TEXT = re.compile(
    r".*attn2\.to_[kv]|context_embedder|.*attn\.add_[kv]_proj|time_text_embed\.text_embedder\..*"
)
"""Layers of a U-Net, and of a transformer of SD3's class, that are fed the text."""
NETWORKS = ("unet", "transformer")


@dataclass(frozen=True, kw_only=True)
class KnownLora:
    """The two halves of a model that memorizes."""

    base: Path
    """Diffusers folder."""
    lora: Path
    """In the dialect of diffusers; on the base model it makes the memorizing one."""


def split(model: BenchModel, folder: Path, *, rank: int = RANK) -> KnownLora:
    """Write base model and LoRA into `folder`, unless they stand there.

    Args:
        model: That memorizes.
        folder: Gets `base` and `lora.safetensors`.
        rank: Of what is taken out of each layer.
    """
    known = KnownLora(base=folder / "base", lora=folder / "lora.safetensors")
    if known.lora.is_file():
        return known
    source = Path(Subject(model.model).location)
    network = next(name for name in NETWORKS if (source / name).is_dir())
    shutil.copytree(source, known.base, dirs_exist_ok=True)
    (weights,) = (known.base / network).glob("*.safetensors")
    state = {name: weight.float() for name, weight in load_file(weights).items()}
    factors = {}
    for name in [n.removesuffix(".weight") for n in state if n.endswith(".weight")]:
        if READS_TEXT.fullmatch(name):
            up, down = leading(state[f"{name}.weight"], rank)
            state[f"{name}.weight"] = state[f"{name}.weight"] - up @ down
            factors |= {f"{network}.{name}.lora_A.weight": down,
                        f"{network}.{name}.lora_B.weight": up}  # fmt: skip
    save_file(state, weights)
    save(factors, known.lora)
    return known


def leading(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors whose product is the best approximation of a matrix at this rank."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return ((u[:, :rank] * root).float().contiguous(),
            (root[:, None] * v[:rank]).float().contiguous())  # fmt: skip


def save(
    factors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a LoRA, whole or not at all."""
    with replace_atomically(path) as part:
        save_file(dict(factors), part, dict(metadata or {}))
    return path
