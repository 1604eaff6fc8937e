"""What each layer of a network reads, remembered in little memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ...arrays import Float, Tensor
from ...score.denoiser import Denoiser
from ...score.noise_levels import noised

ROWS = 128
"""Places of a batch that a layer's sketch takes in from each pass, drawn anew for each layer."""


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
        self.size = size
        self.energy = self.error = 0.0
        """|A|^2, and the most that a direction may have lost of its energy."""
        self.count, self.sum = 0, torch.zeros(width, dtype=torch.float64)
        """Of all rows."""
        self.rows: Float[Tensor, "kept width"] = torch.zeros(0, width, dtype=torch.float64)
        """B, fewer than twice `size` rows."""

    def add(self, rows: Float[Tensor, "row width"]) -> None:
        """Take in rows, of any dtype and device."""
        rows = rows.detach().cpu().double()
        self.energy += float(rows.square().sum())
        self.count += len(rows)
        self.sum += rows.sum(0)
        for block in rows.split(self.size):
            self.rows = torch.cat([self.rows, block])
            if len(self.rows) >= 2 * self.size:
                self._shrink()

    def about(self, centre: Float[Tensor, " width"]) -> Float[Tensor, "few width"]:
        """Return rows R whose R^T R is that of all rows minus `centre`, to the same error."""
        span = torch.linalg.qr(torch.cat([self.rows, self.sum[None], centre[None]]).T).Q
        kept, total, centre = self.rows @ span, self.sum @ span, centre @ span
        crossed = torch.outer(total, centre)
        moved = kept.T @ kept - crossed - crossed.T + self.count * torch.outer(centre, centre)
        values, vectors = torch.linalg.eigh(moved)
        return (values.clamp_min(0).sqrt() * (span @ vectors)).T

    def _shrink(self) -> None:
        """Halve the rows: each direction loses the energy of the first that is dropped."""
        values, vectors = torch.linalg.eigh(self.rows @ self.rows.T)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        lost = values[self.size]
        kept = values[: self.size] > lost
        gains = ((values[: self.size] - lost) / values[: self.size])[kept].sqrt()
        self.rows = gains[:, None] * (vectors[:, : self.size][:, kept].T @ self.rows)
        self.error += float(lost)


@contextmanager
def recording(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Sketch]]:
    """Record what layers read while the block lasts, in a sketch for each layer that runs.

    The network should be in evaluation mode, since dropout would be recorded too.

    Args:
        layers: By name; linear layers, or convolutions, which read one vector at each place.
    """
    sketches: dict[str, Sketch] = {}
    generator = torch.Generator().manual_seed(0)

    def record(name: str, inputs: Tensor) -> None:
        places = inputs.detach().movedim(1, -1) if inputs.ndim == 4 else inputs.detach()
        rows = places.reshape(-1, places.shape[-1])
        chosen = torch.randperm(len(rows), generator=generator)[:ROWS].to(rows.device)
        sketches.setdefault(name, Sketch(rows.shape[1])).add(rows[chosen])

    with reading(layers, record):
        yield sketches


@contextmanager
def reading(layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `take` with the name and the input of each layer that runs while the block lasts."""
    with ExitStack() as undo:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _, args, name=name: take(name, args[0]))
            undo.callback(hook.remove)
        yield


@torch.no_grad()
def run_noisy(
    denoiser: Denoiser,
    latents: Float[Tensor, " sample *latent"],
    prompts: Sequence[str],
    *,
    levels: int = 8,
    seed: int = 0,
) -> None:
    """Run a network on noisy samples, once at each of several levels spread over its schedule.

    Args:
        denoiser: Its predictions are dropped; `recording` takes what its layers read.
        latents: Clean ones.
        prompts: One per latent.
        levels: How many noise levels.
        seed: Of the noise, which the two halves of a batch share.
    """
    cond = denoiser.encode(prompts)
    # The two ends tell least: the cleanest has hardly any noise, the noisiest hardly an image.
    sigmas = denoiser.sigmas(levels + 2)[1 : levels + 1]
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(-(-len(latents) // 2), *latents.shape[1:], generator=generator)
    noise = torch.cat([half, half])[: len(latents)].to(latents)
    for sigma in sigmas:
        noisy = noised(denoiser.parametrization, latents, noise, sigma.to(latents))
        denoiser.denoise(noisy, sigma, cond)
