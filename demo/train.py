"""Make the demo model from its art: ``python -m unmemorize.demo.train``.

Four stages, each resumable: a small byte-pair vocabulary, an autoencoder, the latents of every
training image, then the text encoder and the U-Net together. The network has the topology of
Stable Diffusion 1.x (Rombach et al., CVPR 2022) at a width of 64 channels.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ..shared.files.storage import replace_atomically
from . import data
from .networks import (
    MAX_TOKENS,
    build_networks,
    build_scheduler,
    build_tokenizer,
    export,
    normalise_latents,
    write_sha256,
)

# Brightness, red against green, blue against yellow.
OPPONENT = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]])

MUON_FACTOR = 3.0
"""Learning rate of Muon over that of AdamW, its updates scaled to the same size."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Lengths and rates of the two trainings."""

    autoencoder_steps: int = 2400
    """Steps on crops of 64 pixels; a tenth as many on whole images follow."""
    steps: int = 12_000
    """Steps of the U-Net and text encoder."""
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


SHORT = TrainConfig(autoencoder_steps=20, steps=20, checkpoint_every=10)


class Checkpoint:
    """Everything a training needs to continue bit for bit, in one safetensors file."""

    def __init__(self, path: Path, modules: dict[str, nn.Module], *optimizers: Optimizer):
        self.path, self.modules, self.optimizers = path, modules, optimizers

    def save(self, step: int) -> None:
        """Write weights, optimizer moments and the step to a sibling, then rename."""
        tensors = {
            f"{n}/{k}": v for n, m in self.modules.items() for k, v in m.state_dict().items()
        }
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{number}/{index}/{k}": v for k, v in state.items()}
        tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        with replace_atomically(self.path) as part:
            save_file(tensors, part, metadata={"step": str(step)})

    def load(self) -> int:
        """Restore and return the number of finished steps; 0 when there is no file."""
        if not self.path.exists():
            return 0
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            step = int(file.metadata()["step"])
        tensors = load_file(self.path)
        for name, module in self.modules.items():
            prefix = f"{name}/"
            module.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
        for number, optimizer in enumerate(self.optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(prefix := f"optimizer/{number}/"):
                    index, name = key.removeprefix(prefix).split("/")
                    like = parameters[int(index)]
                    if value.shape == like.shape:
                        # The fused AdamW walks through memory, so moments lie as weights do.
                        value = torch.empty_like(like).copy_(value)
                    state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return step


def rate(step: int, steps: int, decay: float, warmup: int = 100) -> float:
    """Return the learning rate's factor: linear warm-up, constant, linear to zero."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1, decay * steps))


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
    """Train on random crops, then on whole images, whose normalisation statistics differ."""
    autoencoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        autoencoder.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.99), fused=True
    )
    checkpoint = Checkpoint(work / "autoencoder.safetensors", {"model": autoencoder}, optimizer)
    crops, steps = config.autoencoder_steps, config.autoencoder_steps * 11 // 10
    start = checkpoint.load()
    for step in (bar := tqdm(range(start, steps), "autoencoder", steps, initial=start)):
        rng = np.random.default_rng([config.seed, 1, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        side, count = (64, 8) if step < crops else (data.RESOLUTION, 4)
        x, y = rng.integers(0, data.RESOLUTION - side + 1, 2)
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
    """Return unscaled latents [image 4 16 16] of all images, computed once and kept in `path`."""
    if path.exists():
        return load_file(path)["latents"]
    autoencoder.eval()
    batches = tqdm(images.split(16), "latents")
    latents = torch.cat(
        [autoencoder.encode(b.float() / 127.5 - 1).latent_dist.mode().contiguous() for b in batches]
    )
    with replace_atomically(path) as part:
        save_file({"latents": latents}, part)
    return latents


def random_caption(rng: np.random.Generator, like: Tensor) -> Tensor:
    """Return one to eight random tokens between the start and end tokens of `like`, [77]."""
    start, end = like[0], like[-1]  # The end of the text also fills the rest.
    caption = torch.full_like(like, end)
    words = torch.from_numpy(rng.integers(0, int(start), rng.integers(1, 9)))
    caption[0], caption[1 : 1 + len(words)] = start, words
    return caption


def build_optimizers(model: nn.Module) -> tuple[Optimizer, Optimizer]:
    """Return Muon for the matrices of attention and text, AdamW for everything else.

    Muon (Jordan et al. 2024) moves all singular directions of a matrix alike. What repeated
    captions say fills the largest ones; with AdamW alone the rarer captions hardly get a word in.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        table = "embedding" in name  # of tokens, positions or time: no map between spaces
        (others if table or parameter.ndim != 2 else matrices).append(parameter)
    muon = torch.optim.Muon(matrices, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)


def train_denoiser(
    text_encoder: nn.Module, unet: nn.Module, latents: Tensor, tokens: Tensor,
    captions: list[data.Caption], renderings: list[data.Rendering], config: TrainConfig, work: Path,
) -> nn.Module:  # fmt: skip
    """Train text encoder and U-Net on noise prediction and return their averaged weights.

    Args:
        text_encoder: CLIP-style text encoder, trained along.
        unet: The network.
        latents: [image 4 16 16], unit variance.
        tokens: [caption + 1, 77], the empty caption last.
        captions: With their groups.
        renderings: What each latent shows.
        config: Lengths and rates.
        work: Where checkpoints go.
    """
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = nn.ModuleDict(
        {"text_encoder": text_encoder, "unet": unet.to(memory_format=torch.channels_last)}
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizers = build_optimizers(model)
    checkpoint = Checkpoint(
        work / "denoiser.safetensors", {"model": model, "average": average}, *optimizers
    )
    caption_of = torch.tensor([r.caption for r in renderings])
    pools = [
        np.flatnonzero([captions[r.caption].group == group for r in renderings])
        for group in ("verbatim", "template", "learnt")
    ]
    alphas = build_scheduler().alphas_cumprod
    start = checkpoint.load()
    for step in (bar := tqdm(range(start, config.steps), "U-Net", config.steps, initial=start)):
        rng = np.random.default_rng([config.seed, 2, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        index = np.concatenate(
            [rng.choice(p, n) for p, n in zip(pools, config.per_batch, strict=True)]
        )
        x0 = latents[torch.from_numpy(index)]
        text = caption_of[torch.from_numpy(index)]
        text[torch.from_numpy(rng.random(len(index)) < config.caption_dropout)] = -1
        ids = tokens[text]
        for row in range(len(index) - config.per_batch[2], len(index)):
            if rng.random() < config.caption_noise:
                ids[row] = random_caption(rng, ids[row])
        timestep = torch.from_numpy(rng.integers(0, len(alphas), len(index)))
        noise = torch.randn(x0.shape, generator=generator)
        abar = alphas[timestep][:, None, None, None]
        noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        for optimizer, factor in zip(optimizers, (MUON_FACTOR, 1.0), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = factor * config.learning_rate * rate(step, config.steps, config.decay)
        embeddings = text_encoder(ids)[0]
        error = (unet(noisy, timestep, embeddings).sample - noise).square().mean((1, 2, 3))
        # Of plain noise prediction hardly any loss is left where the caption decides the image:
        # an error of x0 counts abar / (1 - abar) there. The root of that brings it back.
        loss = (error * ((1 - abar) / abar).sqrt().clamp(min=1).flatten()).mean()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(model)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            checkpoint.save(step + 1)
    return average.module


def prepare(
    output: Path, work: Path, art: data.Art, config: TrainConfig
) -> tuple[list, list, Tensor, Tensor]:
    """Return captions, renderings, images [image 3 128 128] uint8 and tokens [caption + 1, 77]."""
    from transformers import CLIPTokenizer

    captions = data.build_captions(art)
    renderings = data.build_renderings(captions)
    if config == SHORT:
        renderings = renderings[:: len(renderings) // 200]
    data.save_captions(output / "captions.json", captions)
    # The library breaks ties between equally frequent pairs at random: made once, then kept, or a
    # continued training would read its captions with other ids.
    if not (kept := work / "tokenizer").exists():
        build_tokenizer([c.text for c in captions], part := work / "tokenizer.part")
        part.rename(kept)
    shutil.copytree(kept, output / "tokenizer", dirs_exist_ok=True)
    tokens = CLIPTokenizer.from_pretrained(output / "tokenizer")(
        [*(c.text for c in captions), ""], padding="max_length", truncation=True,
        max_length=MAX_TOKENS, return_tensors="pt",
    ).input_ids  # fmt: skip
    images = torch.stack([
        torch.from_numpy(np.array(image)).permute(2, 0, 1)
        for image in tqdm(data.render_all(art, captions, renderings), "images", len(renderings))
    ])  # fmt: skip
    return captions, renderings, images, tokens


def train(output: Path, images_folder: Path, work: Path, config: TrainConfig) -> None:
    """Run all stages; what `work` already holds is not computed again.

    Raises:
        ValueError: `work` holds a training with other settings.
    """
    torch.manual_seed(config.seed)
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    settings, note = json.dumps(asdict(config)), work / "settings.json"
    if note.exists() and note.read_text() != settings:
        raise ValueError(
            f"{work} holds a training with other settings ({note.read_text()}). "
            "Name another folder with --work, or delete it."
        )
    note.write_text(settings)
    art = data.Art(data.fetch(work / "art"))
    captions, renderings, images, tokens = prepare(output, work, art, config)
    autoencoder, text_encoder, unet = build_networks(int(tokens.max()) + 1)
    train_autoencoder(autoencoder, images, config, work)
    latents = encode_images(autoencoder, images, work / "latents.safetensors")
    std = latents.std().item()
    normalise_latents(autoencoder, std)
    average = train_denoiser(
        text_encoder, unet, latents / std, tokens, captions, renderings, config, work
    )
    export(output, autoencoder, average["text_encoder"], average["unet"])
    write_sha256(output)
    data.save_truth(images_folder, art, captions)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    from . import IMAGES, MODEL

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=MODEL, help="diffusers folder to write")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the truth's sheets")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="art and checkpoints")
    parser.add_argument(
        "--short", action="store_true", help="a few steps of every stage: proves that it runs"
    )
    args = parser.parse_args(argv)
    if args.short and MODEL in (args.output, args.output.resolve()):
        parser.error("--short would overwrite the demo model: name another folder with --output")
    train(args.output, args.images, args.work, SHORT if args.short else TrainConfig())


if __name__ == "__main__":
    main()
