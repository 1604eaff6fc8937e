"""audit.json: every result, the sha256 of every input, and the digest that holds it together.

The digest shows that a report is the one that somebody named by it, and that its parts belong to
each other. It is no signature: who changes a report can compute a new digest, and only one that was
published elsewhere tells the two apart. Nor does it say that the audit was run honestly.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...shared.files.prompts import CAPTION_SUFFIXES, METADATA
from ...shared.files.weights import file_sha256
from ..common.result import finite, versions
from .result import LoraAudit, TrainingImage, TrainingSet

DOCUMENT, CARD = "audit.json", "model_card.md"
SCHEMA_VERSION = 2
"""Of audit.json; raised when a field changes its meaning or goes away."""
TITLE = "unmemorize LoRA audit"
DIGEST = "digest"
"""The field of audit.json that does not count for its own digest."""
NO_DIGEST = "0" * 64
"""In its place while the card that holds it is hashed."""


def to_document(audit: LoraAudit) -> dict[str, Any]:
    """Return the audit as plain JSON values, without folders of this machine.

    Raises:
        OSError: A caption file cannot be read.
    """
    values, training = asdict(audit), audit.training
    del values["folder"]
    held_out = training.held_out_folder
    values["training"] |= {"folder": training.folder.name,
                           "held_out_folder": held_out and held_out.name}  # fmt: skip
    values["words"] = [
        {"caption": caption, "words": [{"word": w, "significance": s} for w, s in words]}
        for caption, words in audit.words
    ]
    values["settings"] = dict(audit.settings)
    apart = [image for image in training.images if image.held_out and held_out]
    inside = [image for image in training.images if not (image.held_out and held_out)]
    return finite({
        "title": TITLE,
        "schema_version": SCHEMA_VERSION,
        "unmemorize": versions()["unmemorize"],
        "inputs": {
            "lora": {"name": audit.lora.name, "sha256": audit.lora.sha256},
            "base": {"name": audit.model, "sha256": audit.model_fingerprint},
            "images": _files(training, training.folder, inside),
            "held_out": _files(training, held_out, apart) if held_out else {},
        },
        **values,
    })  # fmt: skip


def _files(training: TrainingSet, folder: Path, images: Iterable[TrainingImage]) -> dict[str, str]:
    """Return the sha256 of images and of their caption files, by name in the folder, sorted."""
    files = {}
    texts = [path for name in METADATA for path in folder.rglob(name)]
    for image in images:
        files[image.name] = image.sha256
        path = training.path_of(image)
        texts += [path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    files |= {p.relative_to(folder).as_posix(): file_sha256(p) for p in texts if p.is_file()}
    return dict(sorted(files.items()))
