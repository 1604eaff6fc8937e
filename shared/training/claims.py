"""What a saved LoRA claims about its training: entries of its safetensors header."""

from collections.abc import Iterable
from pathlib import Path

from ..files.storage import replace_atomically

CLAIM = "unmemorize."
"""How the names of these entries begin."""


def withdraw(paths: Iterable[Path]) -> None:
    """Take the claims out of saved files, whose weights and other entries stay as they are.

    Args:
        paths: Those that are no safetensors files, or no longer there, are left out: they claim
            nothing.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in paths:
        if path.suffix != ".safetensors" or not path.is_file():
            continue
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            rest = {key: metadata[key] for key in metadata if not key.startswith(CLAIM)}
            if len(rest) == len(metadata):
                continue
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        with replace_atomically(path) as part:
            save_file(tensors, part, metadata=rest)
