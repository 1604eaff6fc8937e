"""What a checkpoint of a protected training adds to the trainer's own."""

import json
import logging
from pathlib import Path

from ..shared.files.storage import write_text
from ..shared.training.protection import Protection

logger = logging.getLogger(__name__)

STATE = "unmemorize.json"
"""In a checkpoint's folder."""


def save_progress(protection: Protection, folder: Path) -> None:
    """Put what a resumed training needs into a checkpoint's folder."""
    write_text(folder / STATE, json.dumps(protection.state_dict()))


def load_progress(protection: Protection, folder: Path) -> None:
    """Continue from a checkpoint whose weights are loaded, also of an unprotected training."""
    state = folder / STATE
    if state.is_file():
        protection.load_state_dict(json.loads(state.read_text("utf-8")))
    else:
        logger.warning("%s is not there: the checkpoint's training was not protected.", state)
        protection.start()
