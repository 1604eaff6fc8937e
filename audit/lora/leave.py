"""What an audit of a LoRA leaves in its folder: page, badge, audit.json, paragraph for the card."""

from pathlib import Path

from ...shared.files.storage import write_text
from ..model.result import dumps
from .badge import render_badge
from .card import render_card
from .document import to_document
from .page import render_lora_page
from .result import LoraAudit
from .seal import DIGEST, digest_of, file_sha256

PAGE, BADGE, DOCUMENT, CARD = "report.html", "badge.svg", "audit.json", "model_card.md"
MATRIX = "similarity.npz"


def leave(audit: LoraAudit, *, include_images: bool = False) -> list[Path]:
    """Write what is to be read, kept and published; the same bytes for the same audit.

    Args:
        audit: What was found; its folder already holds the pictures and similarity.npz.
        include_images: Show training images in the page as they are, otherwise a few pixels of
            them. The folder's own pictures are what the model made, as it made them.

    Returns:
        What was written; audit.json holds the sha256 of everything but the card, which holds its.

    Raises:
        ImportError: The extra `reports` or `models` is not installed.
        StorageError: Nothing can be written.
        OSError: A picture of the audit or a caption file cannot be read.
    """
    folder = audit.folder
    write_text(folder / PAGE, render_lora_page(audit, include_images=include_images))
    write_text(folder / BADGE, render_badge(audit))
    document = to_document(audit)
    document["files"] = {name: file_sha256(folder / name) for name in _files(audit)}
    document[DIGEST] = digest_of(document)
    write_text(folder / DOCUMENT, dumps(document, indent=1) + "\n")
    write_text(folder / CARD, render_card(audit, document[DIGEST]))
    return [folder / name for name in (PAGE, BADGE, DOCUMENT, CARD)]


def _files(audit: LoraAudit) -> list[str]:
    """Return the names of all files of the report that audit.json answers for, sorted."""
    members = [clique.member for clique in audit.attack.cliques] if audit.attack else []
    pictures = [generation.path for generation in audit.generations]
    return sorted({PAGE, BADGE, MATRIX, *pictures, *members})
