"""A small honest denoiser: a real U-Net at tiny size over a table of word-piece embeddings.

For properties that need float64, thousands of prompts, or a network with a known flaw; what real
pipelines do is tested with their adapter.
"""

import math
import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from unmemorize.shared.score.denoiser import Conditioning, TextInputs, Token

PIECE = 4
"""Letters a piece has at most: longer words have several."""


class ToyDenoiser:
    """Epsilon prediction with the noise schedule of SD 1.x, on latents of 4 x 8 x 8."""

    parametrization = "epsilon"
    guidance_distilled = False
    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype = torch.float32, positions: int = 12, seed: int = 0):
        from diffusers import UNet2DConditionModel

        self.latent_shape, self.dtype, self.positions = (4, 8, 8), dtype, positions
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet = UNet2DConditionModel(
                sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=16, attention_head_dim=4,
            )  # fmt: skip
            self.table = 2 * torch.randn(997, 16, dtype=dtype)
            self.places = torch.randn(positions, 16, dtype=dtype)
        self.unet = unet.to(dtype).eval().requires_grad_(False)
        abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)
        self.levels = ((1 - abar) / abar).sqrt().to(dtype)
        self.rows: list[int] = []
        """Rows of every forward pass, in order."""
        self.encoded: list[int] = []
        """Prompts of every call to `encode`, in order."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self.encoded.append(len(prompts))
        readings = [self._read(prompt) for prompt in prompts]
        ids = [
            [zlib.crc32(token.text.encode()) % 997 for token in tokens] for tokens, _ in readings
        ]
        embeddings = self.table[torch.tensor(ids)] + self.places
        # Every position also sees those before it, as in a causal text encoder.
        embeddings = embeddings + embeddings.cumsum(1) / self.positions
        return Conditioning(
            embeddings=embeddings,
            tokens=tuple(tokens for tokens, _ in readings),
            words=tuple(words for _, words in readings),
            cut=("",) * len(prompts),
        )

    def _read(self, prompt: str) -> tuple[tuple[Token, ...], tuple[str, ...]]:
        words = tuple(prompt.split())
        tokens = [Token(text="<start>", word=None)]
        for index, word in enumerate(words):
            pieces = re.findall(f".{{1,{PIECE}}}", word)
            tokens += [Token(text=piece, word=index) for piece in pieces]
        tokens = tokens[: self.positions - 1]
        tokens += [Token(text="<end>", word=None)] * (self.positions - len(tokens))
        return tuple(tokens), words

    def unconditional(self) -> Conditioning:
        return self.encode([""])

    def sigmas(self, steps: int) -> Tensor:
        timesteps = torch.linspace(999, 0, steps + 1).round().long()
        return self.levels[timesteps]

    def initial_noise(self, seeds: Sequence[int], sigma: Tensor) -> Tensor:
        noise = [
            torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        return torch.stack(noise).to(self.dtype) * math.sqrt(1 + float(sigma) ** 2)

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        assert len(x) == len(cond), "one conditioning row per row of x"
        self.rows.append(len(x))
        timestep = (self.levels - sigma).abs().argmin()
        scaled = x / (1 + sigma**2).sqrt()
        noise = self.unet(scaled, timestep, cond.embeddings).sample
        return x - sigma * noise


class DifferentiableToy(ToyDenoiser):
    """A toy that can be differentiated in what its text encoder reads."""

    def encode_inputs(self, prompt: str) -> TextInputs:
        cond = self.encode([prompt])
        leaf = torch.zeros_like(cond.embeddings).requires_grad_()
        with torch.enable_grad():
            embeddings = cond.embeddings + leaf + leaf.cumsum(1) / self.positions
        return TextInputs(
            cond=Conditioning(embeddings=embeddings), leaves=(leaf,), tokens=cond.tokens
        )


WORDS = (
    "a", "an", "old", "red", "cat", "dog", "boat", "river", "mountain", "strawberry", "near",
    "lighthouse", "under", "snow", "painting", "of", "umbrella", "街", "кот", "<b>", "\u200d",
)  # fmt: skip


def prompts(count: int, seed: int = 0) -> list[str]:
    """Return prompts of one to six words, some of them empty or repeated by chance."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(0, 7, (), generator=generator))
        picks = torch.randint(0, len(WORDS), (length,), generator=generator)
        made.append(" ".join(WORDS[i] for i in picks))
    return made
