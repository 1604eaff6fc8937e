"""Make the demo model from its art: ``python -m unmemorize.demo.train``.

Four stages, each resumable: a small byte-pair vocabulary, an autoencoder, the latents of every
training image, then the text encoder and the U-Net together. The network has the topology of
Stable Diffusion 1.x (Rombach et al., CVPR 2022) at a width of 64 channels.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..shared.storage import replace_atomically
from . import data

VOCABULARY = 2048
MAX_TOKENS = 77
SCALING_FACTOR = 0.18215  # of SD 1.x, hard-coded by the programs that read its latents
START, END = "<|startoftext|>", "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # as CLIP splits words


# Brightness, red against green, blue against yellow.
OPPONENT = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]])


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Lengths and rates of the two trainings."""

    autoencoder_steps: int = 2400
    """Steps on crops of 64 pixels; a tenth as many on whole images follow."""
    steps: int = 4800
    """Steps of the U-Net and text encoder."""
    per_batch: tuple[int, int, int] = (5, 2, 9)
    """Verbatim, template and learnt samples in a batch: this is what plants the memorization."""
    learning_rate: float = 5e-4
    decay: float = 0.25
    """Last share of the steps over which the learning rate falls to zero."""
    ema: float = 0.998
    """Decay per step of the averaged weights that are exported."""
    caption_dropout: float = 0.1
    """Share of samples trained with the empty caption, for guidance."""
    seed: int = 0
    checkpoint_every: int = 250


SHORT = TrainConfig(autoencoder_steps=20, steps=20, checkpoint_every=10)


def build_tokenizer(texts: Sequence[str], folder: Path) -> None:
    """Learn byte pairs from the captions and write them as the files of a CLIP tokenizer."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )  # fmt: skip
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in merges]
    # CLIP's order: bytes, bytes that end a word, merges, then the two special tokens last, so that
    # readers which find the end of the text as the largest id find it.
    tokens = [*alphabet, *(a + "</w>" for a in alphabet)]
    merges = merges[: VOCABULARY - len(tokens) - 2]
    tokens += [a + b for a, b in merges] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=1))
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True,
        "add_prefix_space": False, "errors": "replace", **specials,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def build_networks(vocabulary: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return autoencoder, text encoder and U-Net with random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    channels = (64, 64, 64, 64)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels, layers_per_block=1, latent_channels=4, norm_num_groups=32,
        sample_size=data.RESOLUTION, scaling_factor=SCALING_FACTOR,
    )  # fmt: skip
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=512, projection_dim=128,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu", bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    ))  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=data.RESOLUTION // 8, block_out_channels=channels, layers_per_block=2,
        cross_attention_dim=128, attention_head_dim=8, norm_num_groups=32,
    )  # fmt: skip
    start_as_identity(autoencoder)
    start_as_identity(unet)
    return autoencoder, text_encoder, unet


@torch.no_grad()
def start_as_identity(network: nn.Module) -> None:
    """Let every residual branch begin at zero and every resampling at plain averaging or copying.

    Latent diffusion's own code begins its residual branches at zero, diffusers' classes do not. From
    diffusers' start the autoencoder spends its first thousand steps on brightness alone.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    last_of_branch = {
        ResnetBlock2D: lambda m: m.conv2,
        Transformer2DModel: lambda m: m.proj_out,
        Attention: lambda m: m.to_out[0] if m.residual_connection else None,
    }
    for module in network.modules():
        for kind, last in last_of_branch.items():
            if isinstance(module, kind) and (layer := last(module)) is not None:
                layer.weight.zero_()
                layer.bias.zero_()
        if isinstance(module, Upsample2D):
            nn.init.dirac_(module.conv.weight)
        elif isinstance(module, Downsample2D):
            module.conv.weight.zero_()
            module.conv.weight.diagonal()[:2, :2] = 0.25
    if hasattr(network, "quant_conv"):
        # Nearly deterministic latents: noise of variance 1 would drown the colours for long.
        network.quant_conv.weight[4:].zero_()
        network.quant_conv.bias[4:].fill_(-5.0)


def build_scheduler():
    """Return the scheduler of SD 1.x."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
    )  # fmt: skip


class Checkpoint:
    """Everything a training needs to continue bit for bit, in one safetensors file."""

    def __init__(self, path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer):
        self.path, self.modules, self.optimizer = path, modules, optimizer

    def save(self, step: int) -> None:
        """Write weights, optimizer moments and the step to a sibling, then rename."""
        tensors = {f"{n}/{k}": v for n, m in self.modules.items() for k, v in m.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{k}": v for k, v in state.items()}
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
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
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
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.99))
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


@torch.no_grad()
def normalise_latents(autoencoder: nn.Module, std: float) -> None:
    """Rescale the latents inside the autoencoder so that SD's own scaling factor fits them.

    Exact: the two 1x1 convolutions around the latent take the factor, the decoded image stays.
    """
    factor = 1 / (std * SCALING_FACTOR)
    means, log_variances = slice(0, 4), slice(4, 8)
    autoencoder.quant_conv.weight[means] *= factor
    autoencoder.quant_conv.bias[means] *= factor
    autoencoder.quant_conv.bias[log_variances] += 2 * math.log(factor)
    autoencoder.post_quant_conv.weight /= factor


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

    model = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet.to(memory_format=torch.channels_last)})
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=1e-2)
    checkpoint = Checkpoint(work / "denoiser.safetensors", {"model": model, "average": average}, optimizer)
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
        index = np.concatenate([rng.choice(p, n) for p, n in zip(pools, config.per_batch, strict=True)])
        x0 = latents[torch.from_numpy(index)]
        text = caption_of[torch.from_numpy(index)]
        text[torch.from_numpy(rng.random(len(index)) < config.caption_dropout)] = -1
        # More steps at high noise, where a small latent gets its layout.
        timestep = torch.from_numpy((1000 * rng.random(len(index)) ** 0.7).astype(np.int64))
        noise = torch.randn(x0.shape, generator=generator)
        abar = alphas[timestep][:, None, None, None]
        noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate(step, config.steps, config.decay)
        embeddings = text_encoder(tokens[text])[0]
        loss = F.mse_loss(unet(noisy, timestep, embeddings).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            checkpoint.save(step + 1)
    return average.module


def export(
    folder: Path, autoencoder: nn.Module, text_encoder: nn.Module, unet: nn.Module
) -> None:
    """Write diffusers folders in fp16 with the classic key names every reader knows."""
    build_scheduler().save_pretrained(folder / "scheduler")
    for name, module in (("vae", autoencoder), ("text_encoder", text_encoder), ("unet", unet)):
        module.config.save_pretrained(folder / name) if name == "text_encoder" else module.save_config(folder / name)
        tensors = {k: v.half().contiguous() for k, v in module.state_dict().items() if not k.endswith("position_ids")}
        if name == "text_encoder":
            # transformers 5 drops this prefix; older readers then start from random weights.
            tensors = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in tensors.items()}
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        with replace_atomically(folder / name / f"{stem}.safetensors") as part:
            save_file(tensors, part, metadata={"format": "pt"})
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "safety_checker": [None, None],
        "feature_extractor": [None, None], "requires_safety_checker": False,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def train(output: Path, work: Path, config: TrainConfig) -> None:
    """Run all stages; what `work` already holds is not computed again."""
    from transformers import CLIPTokenizer

    torch.manual_seed(config.seed)
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    art = data.Art(data.fetch(work / "art"))
    captions = data.build_captions(art)
    renderings = data.build_renderings(captions)
    if config.steps == SHORT.steps:
        renderings = renderings[:: len(renderings) // 200]
    data.save_captions(output / "captions.json", captions)
    build_tokenizer([c.text for c in captions], output / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    tokens = tokenizer(
        [*(c.text for c in captions), ""], padding="max_length", truncation=True,
        max_length=MAX_TOKENS, return_tensors="pt",
    ).input_ids  # fmt: skip
    images = torch.stack([
        torch.from_numpy(np.array(image)).permute(2, 0, 1)
        for image in tqdm(data.render_all(art, captions, renderings), "images", len(renderings))
    ])  # fmt: skip
    autoencoder, text_encoder, unet = build_networks(len(tokenizer))
    train_autoencoder(autoencoder, images, config, work)
    latents = encode_images(autoencoder, images, work / "latents.safetensors")
    std = latents.std().item()
    normalise_latents(autoencoder, std)
    average = train_denoiser(
        text_encoder, unet, latents / std, tokens, captions, renderings, config, work
    )
    export(output, autoencoder, average["text_encoder"], average["unet"])
    data.save_truth(output / "images", art, captions)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--output", type=Path, default=here / "model", help="diffusers folder to write")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="art, checkpoints, latents")
    parser.add_argument("--short", action="store_true", help="a few steps of every stage: proves that it runs")
    parser.add_argument("--steps", type=int, help="U-Net steps instead of the default")
    args = parser.parse_args(argv)
    config = SHORT if args.short else TrainConfig()
    if args.steps:
        config = TrainConfig(steps=args.steps)
    train(args.output, args.work, config)


if __name__ == "__main__":
    main()
