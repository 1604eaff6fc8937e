"""audit.json: all that was found, and the sha256 of all that went in."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...shared.files.prompts import CAPTION_SUFFIXES, METADATA
from ..model.result import finite
from ..model.summary import versions
from .result import LoraAudit, TrainingImage, TrainingSet
from .seal import file_sha256
from .training_set import path_of

SCHEMA_VERSION = 1
"""Of audit.json; raised when a field changes its meaning or goes away."""
TITLE = "unmemorize LoRA audit"


def to_document(audit: LoraAudit) -> dict[str, Any]:
    """Return the audit as plain JSON values, without folders of this machine.

    Raises:
        OSError: A caption file cannot be read.
    """
    values = asdict(audit)
    del values["folder"]
    values["training"]["folder"] = audit.training.folder.name
    held_out = audit.training.held_out_folder
    values["training"]["held_out_folder"] = held_out and held_out.name
    values["words"] = [
        {"caption": caption, "words": [{"word": w, "significance": s} for w, s in words]}
        for caption, words in audit.words
    ]
    values["settings"] = dict(audit.settings)
    return finite({
        "title": TITLE,
        "schema_version": SCHEMA_VERSION,
        "unmemorize": versions()["unmemorize"],
        "inputs": _inputs(audit),
        **values,
    })  # fmt: skip


def _inputs(audit: LoraAudit) -> dict[str, Any]:
    """Return the sha256 of every file that was read, by its name in its folder."""
    training, other = audit.training, audit.training.held_out_folder
    inside = [image for image in training.images if not (image.held_out and other)]
    apart = [image for image in training.images if image.held_out and other]
    return {
        "lora": {"name": audit.lora.name, "sha256": audit.lora.sha256},
        "base": {"name": audit.model, "sha256": audit.model_fingerprint},
        "images": _files(training, training.folder, inside),
        "held_out": _files(training, other, apart) if other else {},
    }


def _files(training: TrainingSet, folder: Path, images: Iterable[TrainingImage]) -> dict[str, str]:
    """Return images with their caption files, sorted by name."""
    found = {}
    tables = [path for name in METADATA for path in folder.rglob(name)]
    for image in images:
        path = path_of(training, image)
        found[image.name] = image.sha256
        tables += [path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    for path in tables:
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = file_sha256(path)
    return dict(sorted(found.items()))
