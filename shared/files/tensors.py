"""Tensors by number, a file each: what a long measurement has finished, until it is whole."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from .storage import replace_atomically


class TensorFolder:
    """A folder of one job alone, with a safetensors file per finished tensor."""

    def __init__(self, folder: Path):
        """Look into `folder`, which need not be there yet."""
        self.folder = folder

    def numbers(self) -> list[int]:
        """Return the numbers of the finished tensors, in order."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.safetensors"))

    def known(self) -> dict[int, Tensor]:
        """Return every finished tensor by its number."""
        return {number: load_file(self._path(number))["tensor"] for number in self.numbers()}

    def put(self, number: int, tensor: Tensor) -> None:
        """Keep a tensor; killed while writing, the others stay.

        Raises:
            StorageError: It cannot be written.
        """
        with replace_atomically(self._path(number)) as part:
            part.write_bytes(save({"tensor": tensor.contiguous()}))

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"
