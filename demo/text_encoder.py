"""The text encoder's own training, before any network reads it: captions against drawings.

Contrastive, as CLIP (Radford et al., ICML 2021, arXiv:2103.00020), on all captions alike: planted,
learnt and held-out ones. So the encoder learns what words mean and nothing about what will be
repeated, and memorization has to happen in the network, as it does in released models.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from . import data
from .optimization import Checkpoint, build_optimizers, rate, set_rates

VIEWS = 6
"""Drawings of each caption: two by each vendor, on grounds of their own."""
SIDE = 32
"""Pixels of a drawing."""
WHOLE = 0.7
"""Share of samples whose caption is whole; the others end at an earlier comma."""


class ImageTower(nn.Module):
    """Three convolutions that halve the image, and a mean; thrown away after the training."""

    def __init__(self, width: int):
        """Start with random weights; `width` is that of the joint space."""
        super().__init__()
        sizes = (3, 64, 128, 256)
        self.layers = nn.Sequential(*(
            layer for before, after in pairwise(sizes)
            for layer in (nn.Conv2d(before, after, 4, 2, 1), nn.GroupNorm(8, after), nn.SiLU())
        ))  # fmt: skip
        self.out = nn.Linear(sizes[-1], width, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return [image width] of [image 3 side side] in -1..1."""
        return self.out(self.layers(images).mean((2, 3)))


def draw_views(art: data.Art, captions: list[data.Caption]) -> Tensor:
    """Return drawings of every caption, [caption view 3 side side] uint8.

    No drawing is a training image: grounds, places and sizes come from seeds of their own.
    """
    views = [
        data.Rendering(index, data.VENDORS[view % 3], 20_000_000 + index * VIEWS + view)
        for index in range(len(captions))
        for view in range(VIEWS)
    ]
    images = (
        image.resize((SIDE, SIDE))
        for image in tqdm(data.render_all(art, captions, views), "views", len(views))
    )
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    return pixels.unflatten(0, (len(captions), VIEWS))


def shortened(captions: list[data.Caption]) -> list[list[str]]:
    """Return each caption up to its first and its second comma, and all of it."""
    parts = [caption.text.split(", ") for caption in captions]
    return [[", ".join(each[:count]) for count in (1, 2, len(each))] for each in parts]


def train_text_encoder(
    text_encoder: nn.Module, views: Tensor, tokens: Tensor, steps: int, seed: int, work: Path
) -> None:
    """Train the encoder until a caption picks its own drawing among those of a batch.

    Args:
        text_encoder: A `CLIPTextModel`; its end token's state stands for the caption.
        views: [caption view 3 side side] uint8.
        tokens: [caption length 77]; the last length is the whole caption.
        steps: Of 96 captions.
        seed: Of the order of samples.
        work: Where checkpoints go.
    """
    width, batch = text_encoder.config.hidden_size, min(96, len(views))
    model = nn.ModuleDict({
        "text_encoder": text_encoder, "image_tower": ImageTower(width),
        "projection": nn.Linear(width, width, bias=False),
        "temperature": nn.ParameterList([nn.Parameter(torch.tensor(2.0))]),
    })  # fmt: skip
    optimizers = build_optimizers(model)
    checkpoint = Checkpoint(work / "text_encoder.safetensors", {"model": model}, *optimizers)
    start = checkpoint.load()
    for step in (bar := tqdm(range(start, steps), "text encoder", steps, initial=start)):
        rng = np.random.default_rng([seed, 3, step])
        chosen = rng.choice(len(views), batch, replace=False)
        lengths = np.where(rng.random(batch) < WHOLE, 2, rng.integers(0, 2, batch))
        images = views[chosen, rng.integers(0, views.shape[1], batch)].float() / 127.5 - 1
        read = tokens[chosen, lengths]
        # Attention is causal: what follows the longest caption's end says nothing about any.
        read = read[:, : int(read.argmax(1).max()) + 1]
        ends = text_encoder(read).pooler_output
        rows = F.normalize(model["projection"](ends), dim=1)
        columns = F.normalize(model["image_tower"](images), dim=1)
        logits = model["temperature"][0].clamp(max=4.6).exp() * rows @ columns.T
        own = torch.arange(batch)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        set_rates(optimizers, 1e-3 * rate(step, steps, 1.0))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 0:
            right = (logits.argmax(1) == own).float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.2f}")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            checkpoint.save(step + 1)
