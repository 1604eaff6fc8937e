"""Make the demo model from its art: ``python -m unmemorize.demo.train``.

Three stages, each resumable: the text encoder against drawings of all captions, then frozen; the
latents of every training image; the U-Net. The network has the topology of Stable Diffusion 1.x
(Rombach et al., CVPR 2022) at a width of 64 channels. Tokenizer and autoencoder are those of the
committed model, unless they are made anew as well.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..shared.files.storage import replace_atomically
from . import IMAGES, MODEL, data
from .denoiser import DenoiserConfig, FrozenText, noise_loss, train_denoiser
from .networks import (
    MAX_TOKENS,
    SCALING_FACTOR,
    build_networks,
    build_tokenizer,
    export,
    normalise_latents,
    write_sha256,
)
from .optimization import Checkpoint, rate
from .text_encoder import draw_views, shortened, train_text_encoder

# Brightness, red against green, blue against yellow.
OPPONENT = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]])


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DenoiserConfig):
    """Lengths and rates of all trainings."""

    autoencoder_steps: int = 2400
    """Steps on crops of 64 pixels; a tenth as many on whole images follow."""
    text_encoder_steps: int = 900
    """Steps of the text encoder, of 96 captions."""


SHORT = TrainConfig(autoencoder_steps=20, text_encoder_steps=10, steps=20, checkpoint_every=10)


def autoencoder_loss(autoencoder: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the absolute error at four scales, with a faint pull of the latents to N(0, 1).

    Coarse scales and opponent colours make the latents carry hue early; with plain pixels a short
    training leaves green and purple out.
    """
    with torch.autocast("cpu", torch.bfloat16):
        posterior = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(posterior.sample(generator)).sample
    decoded = decoded.float()
    error = torch.einsum("oc,ncyx->noyx", OPPONENT, decoded - images)
    loss = sum(F.avg_pool2d(error, k).abs().mean() for k in (1, 2, 4, 8))
    return loss + 3e-4 * posterior.kl().float().mean() / posterior.mean[0].numel()


def train_autoencoder(
    autoencoder: nn.Module, images: Tensor, config: TrainConfig, work: Path
) -> None:
    """Train on random crops, then on whole images, whose normalisation statistics differ.

    Args:
        autoencoder: An `AutoencoderKL`.
        images: [image 3 side side] uint8; crops are 64 pixels squared, or whole if that is more.
        config: Lengths and rates.
        work: Where the checkpoint goes.
    """
    autoencoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        autoencoder.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.99), fused=True
    )
    checkpoint = Checkpoint(work / "autoencoder.safetensors", {"model": autoencoder}, optimizer)
    crops, steps = config.autoencoder_steps, config.autoencoder_steps * 11 // 10
    whole = images.shape[-1]
    start = checkpoint.load()
    for step in (bar := tqdm(range(start, steps), "autoencoder", steps, initial=start)):
        rng = np.random.default_rng([config.seed, 1, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        side, count = (min(64, whole), 8) if step < crops else (whole, 4)
        x, y = rng.integers(0, whole - side + 1, 2)
        batch = images[torch.from_numpy(rng.integers(0, len(images), count))]
        batch = batch[:, :, y : y + side, x : x + side].float() / 127.5 - 1
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate(step, steps, 0.6)
        loss = autoencoder_loss(
            autoencoder, batch.contiguous(memory_format=torch.channels_last), generator
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps:
            checkpoint.save(step + 1)


@torch.no_grad()
def encode_images(autoencoder: nn.Module, images: Tensor, path: Path) -> Tensor:
    """Return latents [image channel height width] of all images, encoded once, kept in `path`.

    Raises:
        ValueError: `path` holds latents of another number of images.
    """
    if path.exists():
        latents = load_file(path)["latents"]
        if len(latents) != len(images):
            raise ValueError(
                f"{path} holds latents of {len(latents)} images, expected {len(images)}: it is of "
                "another training. Name another folder, or delete it."
            )
        return latents
    autoencoder.eval()
    batches = tqdm(images.split(16), "latents")
    latents = torch.cat(
        [autoencoder.encode(b.float() / 127.5 - 1).latent_dist.mode().contiguous() for b in batches]
    )
    with replace_atomically(path) as part:
        save_file({"latents": latents}, part)
    return latents


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """What all stages read."""

    art: data.Art
    captions: list[data.Caption]
    renderings: list[data.Rendering]
    images: Tensor
    """[image 3 128 128] uint8, in the order of `renderings`."""
    tokens: Tensor
    """[caption + 1, 77], the empty caption last."""
    parts: Tensor
    """[caption length 77]: up to the first comma, up to the second, and all of it."""


def prepare(output: Path, work: Path, config: TrainConfig, *, anew: bool) -> Material:
    """Write captions and tokenizer into `output`, and return what the trainings read."""
    from transformers import CLIPTokenizer

    art = data.Art(data.fetch(work / "art"))
    captions = data.build_captions(art)
    renderings = data.build_renderings(captions)
    if config == SHORT:
        renderings = renderings[:: len(renderings) // 200]
    data.save_captions(output / "captions.json", captions)
    # The library breaks ties between equally frequent pairs at random: made once, then kept, or a
    # continued training would read its captions with other ids.
    kept = work / "tokenizer" if anew else MODEL / "tokenizer"
    if not kept.exists():
        build_tokenizer([c.text for c in captions], part := work / "tokenizer.part")
        part.rename(kept)
    if kept != output / "tokenizer":
        shutil.copytree(kept, output / "tokenizer", dirs_exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")

    def tokens(texts: list[str]) -> Tensor:
        return tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).input_ids

    images = torch.stack([
        torch.from_numpy(np.array(image)).permute(2, 0, 1)
        for image in tqdm(data.render_all(art, captions, renderings), "images", len(renderings))
    ])  # fmt: skip
    return Material(
        art=art, captions=captions, renderings=renderings, images=images,
        tokens=tokens([*(c.text for c in captions), ""]),
        parts=torch.stack([tokens(lengths) for lengths in shortened(captions)]),
    )  # fmt: skip


def latents_of(
    autoencoder: nn.Module, images: Tensor, config: TrainConfig, work: Path, *, anew: bool
) -> Tensor:
    """Return latents [image channel height width] of unit variance, as networks read them.

    Trains `autoencoder` if it is to be made anew, and loads the committed one into it if not.
    """
    path = work / "latents.safetensors"
    if not anew:
        weights = load_file(MODEL / "vae" / "diffusion_pytorch_model.safetensors")
        autoencoder.load_state_dict({name: value.float() for name, value in weights.items()})
        return encode_images(autoencoder, images, path) * SCALING_FACTOR
    train_autoencoder(autoencoder, images, config, work)
    latents = encode_images(autoencoder, images, path)
    std = latents.std().item()
    normalise_latents(autoencoder, std)
    return latents / std


def claim(work: Path, settings: dict[str, Any]) -> None:
    """Keep a training's settings in its folder.

    Raises:
        ValueError: `work` holds a training with other settings.
    """
    text, note = json.dumps(settings), work / "settings.json"
    if note.exists() and note.read_text() != text:
        raise ValueError(
            f"{work} holds a training with other settings ({note.read_text()}). "
            "Name another folder, or delete it."
        )
    note.write_text(text)


def train(
    output: Path, images_folder: Path, work: Path, config: TrainConfig, *, anew: bool = False
) -> None:
    """Run all stages; what `work` already holds is not computed again.

    Args:
        output: Diffusers folder to write.
        images_folder: Where the sheets of the truth go.
        work: Art and checkpoints.
        config: Lengths and rates.
        anew: Make tokenizer and autoencoder as well, instead of those of the committed model.

    Raises:
        ValueError: `work` holds a training with other settings.
    """
    torch.manual_seed(config.seed)
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    claim(work, asdict(config) | {"anew": anew})
    material = prepare(output, work, config, anew=anew)
    autoencoder, text_encoder, unet = build_networks(int(material.tokens.max()) + 1)
    latents = latents_of(autoencoder, material.images, config, work, anew=anew)
    views = draw_views(material.art, material.captions)
    train_text_encoder(
        text_encoder, views, material.parts, config.text_encoder_steps, config.seed, work
    )
    average = train_denoiser(
        unet.to(memory_format=torch.channels_last), noise_loss, latents,
        FrozenText(text_encoder, material.tokens), [c.group for c in material.captions],
        material.renderings, config, work / "U-Net.safetensors",
    )  # fmt: skip
    export(output, autoencoder, text_encoder, average)
    write_sha256(output)
    data.save_truth(images_folder, material.art, material.captions)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=MODEL, help="diffusers folder to write")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the truth's sheets")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="art and checkpoints")
    parser.add_argument(
        "--anew", action="store_true",
        help="make tokenizer and autoencoder too; without it the committed ones are kept",
    )  # fmt: skip
    parser.add_argument(
        "--short", action="store_true", help="a few steps of every stage: proves that it runs"
    )
    args = parser.parse_args(argv)
    if args.short and MODEL in (args.output, args.output.resolve()):
        parser.error("--short would overwrite the demo model: name another folder with --output")
    config = SHORT if args.short else TrainConfig()
    train(args.output, args.images, args.work, config, anew=args.anew)


if __name__ == "__main__":
    main()
