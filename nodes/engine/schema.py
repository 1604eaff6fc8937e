"""What all nodes of the pack have in common."""

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

CATEGORY = "unmemorize"
CalibrationSocket = io.Custom("UNMEMORIZE_CALIBRATION")
"""Socket that carries a `shared.calibration.Calibration`."""
RecordSocket = io.Custom("UNMEMORIZE_RECORD")
"""Socket that carries what Memorization Watch wrote down."""


def schema(*, search_aliases: list[str], **settings: Any) -> io.Schema:
    """Return a node's schema in the pack's category.

    Args:
        search_aliases: Further words a search should find the node by; ComfyUI before 0.16 has no
            such field.
        settings: Fields that every supported ComfyUI knows.
    """
    if "search_aliases" in {field.name for field in fields(io.Schema)}:
        settings["search_aliases"] = search_aliases
    return io.Schema(category=CATEGORY, **settings)
