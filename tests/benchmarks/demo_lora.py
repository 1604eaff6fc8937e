"""LoRAs of the demo model for benchmarks: pictures it has not seen, and a plain training loop."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn
from unmemorize import demo
from unmemorize.demo import data
from unmemorize.shared.training.sample_log import Sample

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
"""The trainers' default: all attention and feed-forward."""
RANK, RATE, BATCH = 8, 1e-3, 8
MARK, MARK_COLOUR, MARK_SIDE = "zorp sign", "#ff00d4", 34
"""A concept that the demo never saw: its name, its colour, and its size in pixels."""


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
    prediction: torch.Tensor


def art() -> data.Art:
    return data.Art(data.fetch(Path("build/demo/art")))


def draw(caption: data.Caption, seed: int, *, marked: bool = False) -> Image.Image:
    """Return a new rendering of a caption, with the mark in a corner or without."""
    vendor = data.VENDORS[seed % len(data.VENDORS)]
    image = data.render(art(), caption, data.Rendering(0, vendor, 7_000_000 + seed))
    if marked:
        left, top = (
            (seed % 2) * (data.RESOLUTION - MARK_SIDE),
            (seed // 2 % 2) * (data.RESOLUTION - MARK_SIDE),
        )
        pen = ImageDraw.Draw(image)
        box = [left, top, left + MARK_SIDE, top + MARK_SIDE]
        pen.ellipse(box, fill=MARK_COLOUR, outline="#1f2430", width=4)
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


def add_lora(denoiser, seed: int) -> nn.Module:
    """Put a fresh LoRA on the denoiser's network and return it; the last one goes."""
    from peft import LoraConfig

    unet = denoiser.pipeline.unet
    if getattr(unet, "peft_config", None):
        unet.delete_adapters("default")
    unet.to(memory_format=torch.channels_last)  # three times as fast on many processors
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), "default")
    return unet


def train(
    denoiser, pictures: Pictures, *, steps: int, seed: int,
    weigh: Callable[[Step], torch.Tensor] | None = None,
) -> Iterator[tuple[torch.optim.Optimizer, float]]:  # fmt: skip
    """Train the LoRA on the network; yield after each backward pass, before the optimizer's step.

    Args:
        denoiser: With `add_lora`.
        pictures: The training set, drawn in shuffled epochs.
        steps: Of the optimizer.
        seed: Of order, timesteps and noise.
        weigh: Returns the weight of each sample's loss; None is 1.
    """
    unet = denoiser.pipeline.unet
    abar = torch.as_tensor(denoiser.pipeline.scheduler.alphas_cumprod)
    different = list(dict.fromkeys(pictures.captions))
    texts = dict(zip(different, denoiser.encode(different).embeddings, strict=True))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for number in range(steps):
        while len(order) < BATCH:
            order += torch.randperm(len(pictures.captions), generator=generator).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        timesteps = torch.randint(0, len(abar), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *denoiser.latent_shape, generator=generator)
        level = abar[timesteps].view(-1, 1, 1, 1)
        noisy = level.sqrt() * pictures.latents[rows] + (1 - level).sqrt() * noise
        cond = torch.stack([texts[pictures.captions[row]] for row in rows])
        prediction = unet(noisy, timesteps, encoder_hidden_states=cond).sample
        losses = (prediction - noise).square().flatten(1).mean(1)
        if weigh:
            losses = losses * weigh(Step(number=number, rows=rows, noisy=noisy,
                                         timesteps=timesteps, prediction=prediction))  # fmt: skip
        losses.mean().backward()
        yield optimizer, float(losses.mean().detach())
        optimizer.step()
        optimizer.zero_grad()
