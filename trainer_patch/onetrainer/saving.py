"""What a protected training of OneTrainer leaves behind: LoRA files, and backups to resume from."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ...shared.patching import Function, patched
from ...shared.training.protection import Protection
from ..checkpoints import load_progress, save_progress

BACKUP = "INTERNAL"
"""Format of backups, which are folders."""


@contextmanager
def saving_hooks(trainer: Any, protection: Protection) -> Iterator[None]:
    """Save projected weights, tell of the protection in the LoRA's header, and check the file."""
    from modules.modelSaver.mixin.LoRASaverMixin import LoRASaverMixin

    def checked(original: Function) -> Function:
        def save(*args: Any, **kwargs: Any) -> None:
            call = inspect.signature(original).bind(*args, **kwargs).arguments
            path = Path(call["output_model_destination"])
            protection.before_save()
            original(*args, **kwargs)
            if str(call["output_model_format"]) == BACKUP:
                save_progress(protection, path)
            else:
                protection.after_save(path)

        return save

    def exact(original: Function) -> Function:
        def write(self: Any, model: Any, destination: str, state: dict[str, Tensor]) -> None:
            protection.clear_rounding(state, source=destination)
            original(self, model, destination, state)

        return write

    def told(original: Function) -> Function:
        def header(*args: Any, **kwargs: Any) -> dict[str, str]:
            return original(*args, **kwargs) | protection.metadata()

        return header

    with (
        patched(trainer.model_saver, "save", checked),
        patched(LoRASaverMixin, "_write_lora_file", exact),
        patched(LoRASaverMixin, "_create_safetensors_header", told),
    ):
        yield


def resume(protection: Protection, backup: Path | None) -> None:
    """Continue from a backup whose weights are loaded, or begin."""
    if backup is None:
        protection.start()
    else:
        load_progress(protection, backup)
