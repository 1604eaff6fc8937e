"""Nearest neighbours among many images: exact search by faiss."""

import numpy as np
import torch

from ...shared.arrays import Float, Tensor
from ...shared.dependencies import require

PURPOSE = "Searching among training images"


class Index:
    """Unit vectors to search among; a search compares with every one of them and misses nothing.

    faiss keeps a copy of the rows and nothing more: 205 MB for 100,000 of 512 numbers.
    """

    def __init__(self, rows: Float[Tensor, " image dimension"]):
        """Put `rows`, each of length 1, into an index.

        Raises:
            ImportError: faiss is not installed; says what to type.
            ValueError: There are no rows.
        """
        if not len(rows):
            raise ValueError("An index needs at least one row.")
        faiss = require("faiss", purpose=PURPOSE, extra="sscd")
        self._index = faiss.IndexFlatIP(rows.shape[1])
        self._index.add(_array(rows))

    def __len__(self) -> int:
        return self._index.ntotal

    def search(self, rows: Float[Tensor, " query dimension"], k: int = 1) -> tuple[Tensor, Tensor]:
        """Return the cosines of each row's neighbours, largest first, and their positions.

        Args:
            rows: Unit vectors.
            k: Neighbours of each; when there are fewer, all of them.

        Returns:
            float32 and int64, both [query k].
        """
        cosines, positions = self._index.search(_array(rows), min(k, len(self)))
        return torch.from_numpy(cosines).clamp(-1, 1), torch.from_numpy(positions)

    def pairs(self, threshold: float) -> tuple[Tensor, Tensor]:
        """Return all pairs of rows whose cosine is at least `threshold`, and these cosines.

        Returns:
            Positions [pair 2], int64, the lower first and in rising order; cosines [pair], float32.
        """
        rows = self._index.reconstruct_n(0, len(self))
        # faiss takes what lies above a number, not what is equal to it.
        above = float(np.nextafter(np.float32(threshold), np.float32(-2)))
        ends, cosines, second = self._index.range_search(rows, above)
        first = np.repeat(np.arange(len(self)), np.diff(ends.astype(np.int64)))
        kept = np.flatnonzero(first < second)
        kept = kept[np.lexsort((second[kept], first[kept]))]
        pairs = np.stack([first[kept], second[kept]], axis=1)
        return torch.from_numpy(pairs), torch.from_numpy(cosines[kept]).clamp(-1, 1)


def _array(rows: Tensor) -> np.ndarray:
    """Return rows as faiss reads them."""
    return np.ascontiguousarray(rows.detach().cpu().float().numpy())
