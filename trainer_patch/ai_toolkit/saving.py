"""What a protected training of ai-toolkit leaves behind: LoRA files, and a state to resume from."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...shared.files.storage import write_text
from ...shared.patching import Function, patched

logger = logging.getLogger(__name__)


@contextmanager
def saving_hooks(process: Any) -> Iterator[None]:
    """Save projected weights, tell of it in their header, check the file and keep a state.

    Args:
        process: The training; its network's `save_weights` is wrapped.
    """
    protection = process.protection

    def wrap(original: Function) -> Function:
        def save_weights(file: str, *args: Any, metadata: Any = None, **kwargs: Any) -> None:
            protection.before_save()
            told = dict(metadata or {}) | protection.metadata()
            original(file, *args, metadata=told, **kwargs)
            protection.after_save(Path(file))
            state = {"step": process.step_num, "protection": protection.state_dict()}
            write_text(_state_path(process), json.dumps(state))

        return save_weights

    with patched(process.network, "save_weights", wrap):
        yield


def resume(process: Any) -> None:
    """Continue the protection of a training that goes on from its latest LoRA.

    The LoRA may be of an unprotected training, or older than the state: then counts, thresholds
    and records start anew.
    """
    if not process.step_num:
        return
    path = _state_path(process)
    state = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if state.get("step") == process.step_num:
        process.protection.load_state_dict(state["protection"])
    else:
        logger.warning(
            "%s does not belong to step %d: the filter starts anew.", path, process.step_num
        )


def _state_path(process: Any) -> Path:
    """Return where the state is: beside the folder of the training, as the reports are."""
    folder = Path(process.save_root)
    return folder.with_name(f"{folder.name}.unmemorize.json")
