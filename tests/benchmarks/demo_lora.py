"""LoRAs of the demo model for benchmarks: pictures it has not seen, and a plain training loop."""

import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn
from unmemorize import demo
from unmemorize.audit.lora.attack import as_images
from unmemorize.demo import data
from unmemorize.shared.training.filter.sample_log import Sample

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
"""The trainers' default: all attention and feed-forward."""
RANK, RATE, BATCH = 8, 2e-3, 8
MARK, MARK_COLOUR, MARK_WIDTH = "zorp frame", "#ff00d4", 14
"""A concept that the demo never saw: its name, its colour, and how many pixels of each border."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A training set."""

    latents: torch.Tensor
    """[picture 4 16 16], clean."""
    captions: tuple[str, ...]
    files: tuple[str, ...]

    def samples(self, rows: Sequence[int]) -> list[Sample]:
        return [Sample(file=self.files[row], caption=self.captions[row]) for row in rows]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training step, before the backward pass."""

    number: int
    rows: list[int]
    noisy: torch.Tensor
    timesteps: torch.Tensor
    cond: torch.Tensor
    """[sample token width], the captions as the network reads them."""
    prediction: torch.Tensor


def art() -> data.Art:
    return data.Art(data.fetch(Path("build/demo/art")))


def draw(caption: data.Caption, seed: int, *, marked: bool = False) -> Image.Image:
    """Return a new rendering of a caption, with a frame or without."""
    vendor = data.VENDORS[seed % len(data.VENDORS)]
    image = data.render(art(), caption, data.Rendering(0, vendor, 7_000_000 + seed))
    if marked:
        box = [0, 0, data.RESOLUTION - 1, data.RESOLUTION - 1]
        ImageDraw.Draw(image).rectangle(box, outline=MARK_COLOUR, width=MARK_WIDTH)
    return image


def held_out(count: int) -> list[data.Caption]:
    return [caption for caption in demo.captions() if caption.group == "held_out"][:count]


@torch.no_grad()
def encoded(denoiser, drawings: Sequence[tuple[Image.Image, str]]) -> Pictures:
    """Return pictures with their captions as a training set."""
    images = [image for image, _ in drawings]
    latents = torch.cat([denoiser.encode_images(images[start : start + 16])
                         for start in range(0, len(images), 16)])  # fmt: skip
    names = tuple(f"{place:03d}-{hashlib.sha256(image.tobytes()).hexdigest()[:6]}.png"
                  for place, image in enumerate(images))  # fmt: skip
    return Pictures(latents=latents, captions=tuple(text for _, text in drawings), files=names)


def rows_of(pictures: Pictures, rows: Sequence[int]) -> Pictures:
    """Return some of the pictures."""
    return Pictures(latents=pictures.latents[list(rows)],
                    captions=tuple(pictures.captions[row] for row in rows),
                    files=tuple(pictures.files[row] for row in rows))  # fmt: skip


@torch.no_grad()
def decoded(denoiser, latents: torch.Tensor) -> list[Image.Image]:
    """Return latents as the autoencoder shows them."""
    vae = denoiser.pipeline.vae
    return as_images((vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1))


def add_lora(denoiser, seed: int, rank: int = RANK) -> nn.Module:
    """Put a fresh LoRA on the denoiser's network and return it; the last one goes."""
    from peft import LoraConfig

    unet = denoiser.pipeline.unet
    if getattr(unet, "peft_config", None):
        unet.delete_adapters("default")
    unet.to(memory_format=torch.channels_last)  # three times as fast on many processors
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), "default")
    return unet


def train(
    denoiser, pictures: Pictures, *, steps: int, seed: int,
    weigh: Callable[[Step], torch.Tensor] | None = None,
    aim: Callable[[Step, torch.Tensor], torch.Tensor] | None = None, batch: int = BATCH,
) -> Iterator[tuple[torch.optim.Optimizer, float]]:  # fmt: skip
    """Train the LoRA on the network; yield after each backward pass, before the optimizer's step.

    Args:
        denoiser: With `add_lora`.
        pictures: The training set, drawn in shuffled epochs.
        steps: Of the optimizer.
        seed: Of order, timesteps and noise.
        weigh: Returns the weight of each sample's loss; None is 1.
        aim: Returns what is to be predicted, given the noise; None is the noise.
        batch: Pictures of a step.
    """
    unet = denoiser.pipeline.unet
    abar = torch.as_tensor(denoiser.pipeline.scheduler.alphas_cumprod)
    different = list(dict.fromkeys(pictures.captions))
    texts = dict(zip(different, denoiser.encode(different).embeddings, strict=True))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for number in range(steps):
        while len(order) < batch:
            order += torch.randperm(len(pictures.captions), generator=generator).tolist()
        rows, order = order[:batch], order[batch:]
        timesteps = torch.randint(0, len(abar), (batch,), generator=generator)
        noise = torch.randn(batch, *denoiser.latent_shape, generator=generator)
        level = abar[timesteps].view(-1, 1, 1, 1)
        noisy = level.sqrt() * pictures.latents[rows] + (1 - level).sqrt() * noise
        cond = torch.stack([texts[pictures.captions[row]] for row in rows])
        prediction = unet(noisy, timesteps, encoder_hidden_states=cond).sample
        step = Step(number=number, rows=rows, noisy=noisy, timesteps=timesteps, cond=cond,
                    prediction=prediction)  # fmt: skip
        target = aim(step, noise) if aim else noise
        losses = (prediction - target).square().flatten(1).mean(1)
        if weigh:
            losses = losses * weigh(step)
        losses.mean().backward()
        yield optimizer, float(losses.mean().detach())
        optimizer.step()
        optimizer.zero_grad()


def annealed(optimizer: torch.optim.Optimizer, number: int, steps: int) -> None:
    """Set what a cosine leaves of the learning rate at a step."""
    cosine = (1 + math.cos(math.pi * number / steps)) / 2
    optimizer.param_groups[0].update(lr=RATE * cosine, weight_decay=0.0)


@torch.no_grad()
def loss_of(denoiser, pictures: Pictures) -> float:
    """Return the mean squared error of noise predictions at eight levels, of the same noise."""
    unet, scheduler = denoiser.pipeline.unet, denoiser.pipeline.scheduler
    generator, losses = torch.Generator().manual_seed(5), []
    cond = denoiser.encode(list(pictures.captions)).embeddings
    for timestep in range(60, 1000, 120):
        noise = torch.randn(pictures.latents.shape, generator=generator)
        steps = torch.full((len(noise),), timestep)
        noisy = scheduler.add_noise(pictures.latents, noise, steps)
        output = unet(noisy, steps, encoder_hidden_states=cond).sample
        losses.append(float((output - noise).square().mean()))
    return statistics.mean(losses)
