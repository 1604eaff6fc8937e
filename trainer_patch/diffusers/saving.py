"""The LoRA that diffusers saves: projected, told of in its header, and checked."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...shared.files.storage import replace_atomically
from ...shared.patching import Function, patched
from ...shared.training.protection import Protection

WEIGHTS = "pytorch_lora_weights.safetensors"
"""How diffusers names a LoRA unless it is told otherwise."""


def stamp(path: Path, protection: Protection) -> None:
    """Write into a saved LoRA's header how it was trained, project it in its own precision, check.

    Raises:
        ProjectionFailed: One of its factors reaches into the subspace.
        ModelError: It is no LoRA whose text side can be checked.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    protection.clear_rounding(tensors, source=str(path))
    with replace_atomically(path) as part:
        save_file(tensors, part, metadata=metadata | protection.metadata())
    protection.after_save(path)


@contextmanager
def saving_hooks(protection: Callable[[], Protection | None]) -> Iterator[None]:
    """Stamp and check every LoRA that diffusers writes."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    def write(original: Function) -> Function:
        def write_lora_layers(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            call = inspect.signature(original).bind(*args, **kwargs).arguments
            if (found := protection()) and call["safe_serialization"]:
                stamp(Path(call["save_directory"]) / (call["weight_name"] or WEIGHTS), found)
            return result

        return write_lora_layers

    with patched(LoraBaseMixin, "write_lora_layers", write):
        yield
