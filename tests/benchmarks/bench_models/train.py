"""The training of a benchmark's model: autoencoder, frozen text encoders, network."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import torch
from unmemorize.demo.denoiser import train_denoiser
from unmemorize.demo.networks import build_autoencoder, build_tokenizer
from unmemorize.demo.text_encoder import train_text_encoder
from unmemorize.demo.train import claim, latents_of

from . import truth
from .recipes import Recipe

SHORT = {"autoencoder_steps": 2, "text_encoder_steps": 2, "steps": 2}
SHORT_PAIRS = truth.PLANTED + truth.UNSEEN + 4


def pixels(images) -> torch.Tensor:
    """Return [... 3 32 32] of images [... 32 32 3]."""
    return torch.from_numpy(images).movedim(-1, -3).contiguous()


def make(recipe: Recipe, folder: Path, *, short: bool = False) -> None:
    """Make one model in `folder`; what is there already is not made again.

    Writes the diffusers folder `model`, `captions.json`, `images.safetensors` and, for what it
    needs to continue, `work`.

    Args:
        recipe: All that makes it.
        folder: Its own, beside the folder `art` of fetched packages.
        short: A few steps of every stage on few captions.

    Raises:
        ValueError: The folder holds a training with other settings.
    """
    from transformers import CLIPTokenizer

    config = replace(recipe.config, **SHORT) if short else recipe.config
    work, model = folder / "work", folder / "model"
    work.mkdir(parents=True, exist_ok=True)
    art = recipe.art(folder.parent / "art")
    captions = truth.sort(art, config.seed, SHORT_PAIRS if short else recipe.pairs)
    texts = [c.text for c in captions]
    settings = {
        "shape": asdict(recipe.shape), "autoencoder": recipe.autoencoder,
        "captions": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
    }  # fmt: skip
    claim(work, asdict(config) | settings)
    if model.exists():
        return
    truth.save_captions(folder / "captions.json", captions)
    if not (drawn := folder / "images.safetensors").exists():
        truth.save_images(drawn, art, captions)
    if not (work / "tokenizer").exists():  # ties are broken by chance: made once, then kept
        build_tokenizer(texts, part := work / "tokenizer.part")
        part.rename(work / "tokenizer")
    length = recipe.shape.tokens
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer", model_max_length=length)

    def tokens(texts: list[str]) -> torch.Tensor:
        return tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids

    torch.manual_seed(config.seed)
    autoencoder = build_autoencoder(truth.SIDE, recipe.autoencoder, recipe.shape.latent_channels)
    networks = recipe.shape.build(len(tokenizer))
    images = pixels(truth.load_images(drawn).pixels)
    latents = latents_of(autoencoder, images, config, work, anew=True)
    parts = torch.stack([tokens(list(art.phrases(c.slots))) for c in captions])
    views = pixels(truth.draw(art, captions, truth.views(captions)))
    views = views.unflatten(0, (len(captions), truth.VIEWS))
    for number, encoder in enumerate(networks.text_encoders):
        (place := work / f"text{number}").mkdir(exist_ok=True)
        train_text_encoder(
            encoder, views, parts, config.text_encoder_steps, config.seed + number, place
        )
    text = networks.freeze(tokens([*texts, ""]))
    average = train_denoiser(
        networks.network, networks.loss, latents, text, [c.group for c in captions],
        truth.renderings(captions), config, work / "network.safetensors",
    )  # fmt: skip
    networks.save(part := folder / "model.part", autoencoder, average, tokenizer)
    part.rename(model)
