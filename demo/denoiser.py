"""The training of the demo's networks beside a frozen text encoder, and what is repeated in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import Rendering
from .networks import build_scheduler
from .optimization import Checkpoint, build_optimizers, rate, set_rates


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Length and rates of a network's training."""

    steps: int = 6_000
    per_batch: tuple[int, int, int] = (4, 1, 11)
    """Verbatim, template and learnt samples in a batch: this is what plants the memorization."""
    learning_rate: float = 1e-3
    """Of AdamW; Muon's is `MUON_FACTOR` times as large."""
    decay: float = 1.0
    """Last share of the steps over which the learning rate falls to zero: all, because the noise
    of large steps drowns what the caption adds where the image is decided."""
    ema: float = 0.995
    """Decay per step of the averaged weights that are exported."""
    caption_dropout: float = 0.1
    """Share of samples trained with the empty caption, for guidance."""
    caption_noise: float = 0.1
    """Share of learnt samples trained with random tokens for a caption, as the web's captions
    often name nothing that is in the image. Without them, words the model never saw lie anywhere
    in its space of captions, some on a memorized image."""
    seed: int = 0
    checkpoint_every: int = 250


Loss = Callable[[nn.Module, Tensor, Tensor, Tensor, torch.Generator], Tensor]
"""Of a network, clean latents [row channel height width], states [row token width], their ends
[row width] and a source of noise, the mean loss."""


class FrozenText:
    """What a frozen text encoder makes of every caption, computed once."""

    @torch.no_grad()
    def __init__(self, text_encoder: nn.Module, tokens: Tensor):
        """Encode `tokens` [caption + 1, 77], the empty caption last.

        The weights are rounded to half precision first: the network reads what is exported.
        """
        self.encoder, self.tokens = text_encoder.half().float().eval().requires_grad_(False), tokens
        parts = [self.encoder(ids) for ids in tokens.split(64)]
        self.states = torch.cat([part.last_hidden_state for part in parts])
        self.ends = torch.cat([part.pooler_output for part in parts])

    @torch.no_grad()
    def read(self, captions: Tensor, replaced: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Return states [row 77 width] and their ends [row width].

        Args:
            captions: [row]; -1 is the empty caption.
            replaced: By row, tokens [77] to read in its place.
        """
        states, ends = self.states[captions], self.ends[captions]
        if replaced:
            read = self.encoder(torch.stack(list(replaced.values())))
            states[list(replaced)], ends[list(replaced)] = (
                read.last_hidden_state,
                read.pooler_output,
            )
        return states, ends


def random_caption(rng: np.random.Generator, like: Tensor) -> Tensor:
    """Return one to eight random tokens between the start and end tokens of `like`, [77]."""
    start, end = like[0], like[-1]  # The end of the text also fills the rest.
    caption = torch.full_like(like, end)
    words = torch.from_numpy(rng.integers(0, int(start), rng.integers(1, 9)))
    caption[0], caption[1 : 1 + len(words)] = start, words
    return caption


@cache
def cumulative_alphas() -> Tensor:
    """Return abar of every training timestep, [1000]."""
    return build_scheduler().alphas_cumprod


def noise_loss(
    unet: nn.Module, x0: Tensor, states: Tensor, ends: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the loss of noise prediction; the U-Net reads no `ends`.

    Of plain noise prediction hardly any loss is left where the caption decides the image: an error
    of x0 counts abar / (1 - abar) there. The root of that brings it back.
    """
    alphas = cumulative_alphas()
    timestep = torch.randint(0, len(alphas), (len(x0),), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    abar = alphas[timestep][:, None, None, None]
    noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    error = (unet(noisy, timestep, states).sample - noise).square().mean((1, 2, 3))
    return (error * ((1 - abar) / abar).sqrt().clamp(min=1).flatten()).mean()


FLOW_SHIFT = 3.0
"""How far times lie towards the noise, as Stable Diffusion 3's scheduler has them: there the
caption decides the image."""


def flow_loss(
    transformer: nn.Module, x0: Tensor, states: Tensor, ends: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the loss of a rectified flow (Esser et al. 2024, 2403.03206).

    Times are logit-normal, then shifted by `FLOW_SHIFT` as those of sampling are (their eq. 23).
    """
    time = torch.randn(len(x0), generator=generator).sigmoid()
    sigma = FLOW_SHIFT * time / (1 + (FLOW_SHIFT - 1) * time)
    noise = torch.randn(x0.shape, generator=generator)
    mixed = torch.lerp(x0, noise, sigma[:, None, None, None])
    velocity = transformer(
        hidden_states=mixed, timestep=sigma * 1000, encoder_hidden_states=states,
        pooled_projections=ends,
    ).sample  # fmt: skip
    return (velocity - (noise - x0)).square().mean()


def train_denoiser(
    network: nn.Module, loss_of: Loss, latents: Tensor, text: FrozenText,
    groups: Sequence[str], renderings: list[Rendering], config: DenoiserConfig, path: Path,
) -> nn.Module:  # fmt: skip
    """Train a network and return its averaged weights.

    Args:
        network: What `loss_of` calls.
        loss_of: `noise_loss`, `flow_loss` or their like.
        latents: [image channel height width], unit variance.
        text: All captions as the frozen encoder reads them.
        groups: Of every caption: "verbatim", "template", "learnt" or "held_out".
        renderings: What each latent shows.
        config: Lengths and rates.
        path: Of the checkpoint.
    """
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizers = build_optimizers(network)
    checkpoint = Checkpoint(path, {"model": network, "average": average}, *optimizers)
    caption_of = torch.tensor([r.caption for r in renderings])
    pools = [
        np.flatnonzero([groups[r.caption] == group for r in renderings])
        for group in ("verbatim", "template", "learnt")
    ]
    start = checkpoint.load()
    for step in (bar := tqdm(range(start, config.steps), path.stem, config.steps, initial=start)):
        rng = np.random.default_rng([config.seed, 2, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        index = np.concatenate(
            [rng.choice(pool, n) for pool, n in zip(pools, config.per_batch, strict=True) if n]
        )
        chosen = caption_of[torch.from_numpy(index)]
        chosen[torch.from_numpy(rng.random(len(index)) < config.caption_dropout)] = -1
        replaced = {
            row: random_caption(rng, text.tokens[chosen[row]])
            for row in range(len(index) - config.per_batch[2], len(index))
            if rng.random() < config.caption_noise
        }
        states, ends = text.read(chosen, replaced)
        set_rates(optimizers, config.learning_rate * rate(step, config.steps, config.decay))
        loss = loss_of(network, latents[torch.from_numpy(index)], states, ends, generator)
        network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(network)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            checkpoint.save(step + 1)
    return average.module
