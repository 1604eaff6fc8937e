"""Embeddings of images, computed once for each content and kept on disk."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

import torch

from ...shared.arrays import Float, Tensor
from ...shared.files.images import ImageFiles
from ...shared.files.storage import cache_folder, replace_atomically
from ...shared.files.weights import file_sha256
from ...shared.score.detection import Progress
from ..common.sscd import BATCH, DIMENSIONS, Sscd

logger = logging.getLogger(__name__)

CHUNK = 16 * BATCH
"""Images whose rows are written together: a kill loses at most so many."""
VERSION = 2
"""Raised when images are read in another way: rows of before are not found again."""


class FeatureCache:
    """Embeddings by the sha256 of image files, for one encoder.

    Each chunk of rows is a file of its own, named for the images in it and written whole or not at
    all. So processes may write at the same time, a kill loses one chunk, and the folder may be
    deleted whenever nothing runs.
    """

    def __init__(self, encoder: Sscd, folder: Path | None = None):
        """Open the cache of an encoder; rows of 2 kB lie in `folder`, or the user's cache."""
        self._encoder = encoder
        weights = file_sha256(encoder.path)
        self.name = f"SSCD: {encoder.path.name}, sha256 {weights}"
        self._folder = (folder or cache_folder()) / f"sscd-{VERSION}-{weights[:32]}"

    def rows(
        self, paths: Sequence[Path], *, progress: Progress | None = None
    ) -> Float[Tensor, " image 512"]:
        """Return one unit vector per image file, float32; equal files are embedded once.

        `progress` is called with the number of images finished since the last call.

        Raises:
            ValueError: A file is no whole image; names it.
        """
        keys = [file_sha256(path) for path in paths]
        known = dict(self._read(set(keys)))
        todo = {key: path for key, path in zip(keys, paths, strict=True) if key not in known}
        if progress is not None:
            progress(len(keys) - len(todo))
        for start in range(0, len(todo), CHUNK):
            part = dict(list(todo.items())[start : start + CHUNK])
            rows = self._encoder.embed(ImageFiles(list(part.values())), progress=progress)
            fresh = dict(zip(part, rows, strict=True))
            self._write(fresh)
            known |= fresh
        return torch.stack([known[key] for key in keys]) if keys else torch.zeros(0, DIMENSIONS)

    def _read(self, wanted: Set[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the rows that are kept; a file that cannot be read counts as absent."""
        from safetensors import SafetensorError, safe_open

        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    digests = file.get_tensor("sha256").numpy().tobytes().hex()
                    keys = [digests[start : start + 64] for start in range(0, len(digests), 64)]
                    rows = file.get_tensor("rows") if wanted & set(keys) else None
            except (SafetensorError, OSError) as error:
                logger.warning("%s is not used: %s", path, error)
                continue
            if rows is not None:
                yield from ((k, row) for k, row in zip(keys, rows, strict=True) if k in wanted)

    def _write(self, rows: Mapping[str, Tensor]) -> None:
        """Keep rows; where nothing can be written they are computed again next time."""
        from safetensors.torch import save_file

        digests = torch.tensor([list(bytes.fromhex(key)) for key in rows], dtype=torch.uint8)
        name = hashlib.sha256(bytes(digests.flatten().tolist())).hexdigest()[:32]
        try:
            with replace_atomically(self._folder / f"{name}.safetensors") as part:
                save_file({"sha256": digests, "rows": torch.stack(list(rows.values()))}, part)
        except OSError as error:
            logger.warning("Embeddings are not kept for next time: %s", error)
