"""A denoiser of which it is written down what each prompt adds to the prediction."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from unmemorize.shared.score.denoiser import Conditioning

ELEMENTS = 64


def noise(seed: int, count: int = 1) -> Tensor:
    """Return [count element]."""
    return torch.randn(count, ELEMENTS, generator=torch.Generator().manual_seed(seed))


class ScriptedDenoiser:
    """Adds D = `added[prompt]`, [element], at every starting noise and level."""

    parametrization = "epsilon"
    guidance_distilled = False
    latent_shape = (1, 8, 8)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, added: Mapping[str, Tensor]):
        self.added = added
        self.rows = 0
        """Of all forward passes."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(embeddings=torch.stack([self.added[p] for p in prompts])[:, None])

    def unconditional(self) -> Conditioning:
        return Conditioning(embeddings=torch.zeros(1, 1, ELEMENTS))

    def sigmas(self, steps: int) -> Tensor:
        return torch.linspace(8, 0, steps + 1)

    def initial_noise(self, seeds: Sequence[int], sigma: Tensor) -> Tensor:
        return torch.zeros(len(seeds), *self.latent_shape)

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.rows += len(x)
        return x - sigma * cond.embeddings.view_as(x)
