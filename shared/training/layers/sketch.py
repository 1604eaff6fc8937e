"""Many vectors remembered by few: their energy in every direction, to a known error."""

import torch

from ...arrays import Float, Tensor


class Sketch:
    """Frequent Directions: `size` rows B for any number of rows A (Liberty, KDD 2013).

    For every unit vector v, 0 <= |A v|^2 - |B v|^2 <= `error`, and for every k < size the error is
    at most |A - A_k|^2 / (size - k), with A_k the best approximation of rank k. No matrix of
    width x width is made, and nothing is random.
    """

    def __init__(self, width: int, size: int = 64):
        """Start without rows.

        Args:
            width: Of a row.
            size: Rows to keep, at least 1.
        """
        if size < 1:
            raise ValueError(f"`size` must be at least 1, got {size}.")
        self.width, self.size = width, size
        self.energy = self.error = 0.0
        """|A|^2, and the most that a direction may have lost of its energy."""
        self.count, self.sum = 0, torch.zeros(width, dtype=torch.float64)
        """Of all rows."""
        self._kept = torch.zeros(0, width, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "row width"]) -> None:
        """Take in rows, of any dtype and device."""
        rows = rows.detach().double().cpu()
        self.energy += float(rows.square().sum())
        self.count += len(rows)
        self.sum += rows.sum(0)
        for block in rows.split(self.size):
            self._kept = torch.cat([self._kept, block])
            if len(self._kept) >= 2 * self.size:
                self._shrink()

    @property
    def rows(self) -> Float[Tensor, "kept width"]:
        """B, fewer than twice `size` rows in float64."""
        return self._kept

    def about(self, centre: Float[Tensor, " width"]) -> Float[Tensor, "few width"]:
        """Return rows R whose R^T R is that of all rows minus `centre`, to the same error."""
        span = torch.linalg.qr(torch.cat([self._kept, self.sum[None], centre[None]]).T).Q
        kept, total, centre = self._kept @ span, self.sum @ span, centre @ span
        crossed = torch.outer(total, centre)
        moved = kept.T @ kept - crossed - crossed.T + self.count * torch.outer(centre, centre)
        values, vectors = torch.linalg.eigh(moved)
        return (values.clamp_min(0).sqrt() * (span @ vectors)).T

    def _shrink(self) -> None:
        """Halve the rows: each direction loses the energy of the first that is dropped."""
        values, vectors = torch.linalg.eigh(self._kept @ self._kept.T)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        lost = values[self.size]
        kept = values[: self.size] > lost
        gains = ((values[: self.size] - lost) / values[: self.size])[kept].sqrt()
        self._kept = gains[:, None] * (vectors[:, : self.size][:, kept].T @ self._kept)
        self.error += float(lost)
