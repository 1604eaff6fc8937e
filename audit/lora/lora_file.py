"""A LoRA file: what it is, and what it says of itself against the folder and the base model."""

import hashlib
import json
from pathlib import Path

from ...shared.wording import visible
from .base_model import BaseModel
from .header import LONGEST, read_header
from .lora_kinds import kind_of
from .lora_remarks import base_remarks, caption_remarks, count_remarks, own_remarks
from .result import LoraFacts, TrainingSet


def read_lora_facts(path: Path, training: TrainingSet, base: str | Path) -> LoraFacts:
    """Return what a LoRA file is, and what its header says against the folder and the base model.

    Headers are text that anybody can write or remove: a difference is a reason to look, agreement
    is no proof, and where nothing is said nothing is compared.

    Args:
        path: A safetensors file in the dialect of kohya, PEFT, diffusers or LyCORIS.
        training: The folder it is said to be trained on.
        base: Diffusers folder, single-file checkpoint, or hub id, of which only the name is used.

    Raises:
        ModelError: It is missing, a pickle, cut off, not safetensors, or no LoRA.
    """
    kind, header, model = kind_of(path), read_header(path), BaseModel(base)
    base_name = header.base_name or _peft_base(path)
    remarks = [
        *base_remarks(kind, header, base_name, model),
        *count_remarks(header, training),
        *caption_remarks(header, training),
        *own_remarks(kind, header),
    ]
    by_lycoris = (header.module or "").startswith("lycoris")  # its LoCon looks like kohya's
    remarks.sort(key=lambda remark: not remark.urgent)
    return LoraFacts(
        name=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        dialect="lycoris" if by_lycoris else kind.dialect,
        kinds=kind.kinds,
        rank=kind.rank,
        modules=kind.modules,
        epoch=header.epoch,
        epochs=header.epochs,
        steps=header.steps,
        images=header.images,
        base_name=base_name,
        base_hash=header.base_sha256 or header.base_hash,
        says=tuple(remark.text for remark in remarks),
        warnings=tuple(remark.text for remark in remarks if remark.urgent),
    )


def _peft_base(path: Path) -> str | None:
    """Return the base model that PEFT's configuration beside the file names."""
    try:
        config = json.loads(path.with_name("adapter_config.json").read_text("utf-8"))
        return visible(config["base_model_name_or_path"][:LONGEST]) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None
