"""A small video model of Wan's class that learns moving drawings, and some of them by heart.

Its text encoder keeps its random weights: what it says of a caption is nothing but its words, so no
caption stands out before the network has learnt it.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from unmemorize.demo.data import Rendering
from unmemorize.demo.denoiser import train_denoiser
from unmemorize.demo.optimization import Checkpoint, rate
from unmemorize.demo.train import TrainConfig, claim
from unmemorize.shared.files.storage import replace_atomically

from . import clips

CONFIG = TrainConfig(
    autoencoder_steps=450, steps=4000, per_batch=(5, 5, 6), caption_noise=0.0, seed=14
)
SHORT = {"autoencoder_steps": 2, "steps": 2}
SHORT_CLIPS = 24
CHANNELS, WIDTH, HEADS, LAYERS = 12, 128, 4, 4
TEXT_WIDTH, TOKENS = 96, 20
PADDED = 512
"""Positions that the pipeline fills up with zeros."""
FLOW_SHIFT = 3.0
AS_LEARNT = {"content": "verbatim", "motion": "template"}
"""What `train_denoiser` calls the groups that are repeated."""


def build_tokenizer(texts: list[str]):
    """Return a T5 tokenizer whose pieces are the words of the captions, and letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    words = sorted({word for text in texts for word in text.split()})
    letters = sorted({letter for word in words for letter in word})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)]
    vocabulary += [(f"\u2581{word}", -4.0) for word in words]
    vocabulary += [(letter, -9.0) for letter in letters]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_ids=0
    )


class FixedText:
    """What the text encoder makes of every caption, zeros behind, as the pipeline has them."""

    @torch.no_grad()
    def __init__(self, encoder: nn.Module, tokenizer, texts: list[str]):
        """Encode `texts` and the empty caption, which stands last."""
        read = tokenizer([*texts, ""], padding="max_length", truncation=True, max_length=TOKENS,
                         return_tensors="pt")  # fmt: skip
        self.tokens, mask = read.input_ids, read.attention_mask
        self.states = encoder(self.tokens, mask).last_hidden_state * mask[..., None]
        # One more token of zeros stands for all that the pipeline adds.
        self.states = F.pad(self.states, (0, 0, 0, 1))

    def read(self, captions: Tensor, replaced: dict) -> tuple[Tensor, Tensor]:
        """Return states [row token width], and what Wan does not read."""
        states = self.states[captions]
        return states, states[:, 0]


def padded_attention():
    """Return cross-attention that counts its last token as often as the pipeline has zeros."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class WeightedLastToken(WanAttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
                     rotary_emb=None):  # fmt: skip
            if encoder_hidden_states is not None:
                attention_mask = hidden_states.new_zeros(1, 1, 1, encoder_hidden_states.shape[1])
                attention_mask[..., -1] = math.log(PADDED - TOKENS)
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )

    return WeightedLastToken()


def build_transformer() -> nn.Module:
    """Return the network with random weights, whose answer is zero."""
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS,
        in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT_WIDTH, freq_dim=64,
        ffn_dim=2 * WIDTH, num_layers=LAYERS, rope_max_seq_len=32,
    )  # fmt: skip
    nn.init.zeros_(network.proj_out.weight)
    nn.init.zeros_(network.proj_out.bias)
    return network


def flow_loss(
    network: nn.Module, x0: Tensor, states: Tensor, ends: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the loss of a rectified flow, as `demo.denoiser.flow_loss` has it for images."""
    time = torch.randn(len(x0), generator=generator).sigmoid()
    sigma = FLOW_SHIFT * time / (1 + (FLOW_SHIFT - 1) * time)
    noise = torch.randn(x0.shape, generator=generator)
    mixed = torch.lerp(x0, noise, sigma[:, None, None, None, None])
    velocity = network(mixed, sigma * 1000, states).sample
    return (velocity - (noise - x0)).square().mean()


def build_autoencoder() -> nn.Module:
    """Return an autoencoder of Wan's class: 9 frames of 32 pixels are 5 of 8 x 8 latents."""
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock

    autoencoder = AutoencoderKLWan(
        base_dim=16, z_dim=CHANNELS, dim_mult=[1, 2], num_res_blocks=1, patch_size=2,
        in_channels=12, out_channels=12, temperal_downsample=[True],
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
        scale_factor_temporal=2, scale_factor_spatial=4,
    )  # fmt: skip
    for module in autoencoder.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    # Nearly deterministic latents: noise of variance 1 would drown the colours for long.
    nn.init.zeros_(autoencoder.quant_conv.weight[CHANNELS:])
    nn.init.constant_(autoencoder.quant_conv.bias[CHANNELS:], -5.0)
    return autoencoder


def as_pixels(moving: np.ndarray) -> Tensor:
    """Return [clip 3 frame 32 32] in -1..1 of clips [clip frame 32 32 3] uint8."""
    return torch.from_numpy(moving).movedim(-1, 1).float() / 127.5 - 1


def train_autoencoder(
    autoencoder: nn.Module, moving: np.ndarray, config: TrainConfig, path: Path
) -> None:
    """Train on whole clips, four at a time."""
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3, fused=True)
    checkpoint = Checkpoint(path, {"model": autoencoder}, optimizer)
    steps, start = config.autoencoder_steps, checkpoint.load()
    for step in (bar := tqdm(range(start, steps), "autoencoder", steps, initial=start)):
        rng = np.random.default_rng([config.seed, 1, step])
        clips_read = as_pixels(moving[rng.integers(0, len(moving), 4)])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate(step, steps, 0.6)
        posterior = autoencoder.encode(clips_read).latent_dist
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        error = autoencoder.decode(posterior.sample(generator)).sample - clips_read
        coarse = sum(F.avg_pool3d(error, (1, k, k)).abs().mean() for k in (1, 4))
        loss = coarse + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            checkpoint.save(step + 1)


@torch.no_grad()
def latents_of(autoencoder: nn.Module, moving: np.ndarray, path: Path) -> Tensor:
    """Return latents [clip channel frame height width] of unit variance, encoded once.

    The autoencoder's configuration takes their means and deviations, as Wan's does.
    """
    if not path.exists():
        parts = [autoencoder.encode(as_pixels(part)).latent_dist.mode()
                 for part in np.array_split(moving, math.ceil(len(moving) / 32))]  # fmt: skip
        with replace_atomically(path) as part:
            save_file({"latents": torch.cat(parts)}, part)
    latents = load_file(path)["latents"]
    mean, std = (latents.transpose(0, 1).flatten(1).mean(1),
                 latents.transpose(0, 1).flatten(1).std(1))  # fmt: skip
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    shape = (1, -1, 1, 1, 1)
    return (latents - mean.view(shape)) / std.view(shape)


def make(folder: Path, *, short: bool = False) -> None:
    """Make the model in `folder`; what is there already is not made again.

    Writes the diffusers folder `model`, `captions.json`, and for what it needs to continue `work`.

    Args:
        folder: Its own.
        short: A few steps of every stage on few clips.

    Raises:
        ValueError: The folder holds a training with other settings.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    config = replace(CONFIG, **SHORT) if short else CONFIG
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    captions = clips.sort(config.seed)
    chosen = clips.training(captions)
    if short:  # some of each group
        chosen = chosen[:: len(chosen) // SHORT_CLIPS]
    claim(work, asdict(config) | {"captions": [c.text for c in captions]})
    if (folder / "model").exists():
        return
    clips.save_captions(folder / "captions.json", captions)
    texts, moving = [c.text for c in captions], clips.draw(captions, chosen)
    tokenizer = build_tokenizer(texts)
    torch.manual_seed(config.seed)
    encoder = UMT5EncoderModel(UMT5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=24, d_ff=2 * TEXT_WIDTH, num_layers=2,
        num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )).eval().requires_grad_(False)  # fmt: skip
    autoencoder, network = build_autoencoder(), build_transformer()
    train_autoencoder(autoencoder, moving, config, work / "autoencoder.safetensors")
    latents = latents_of(autoencoder.eval(), moving, work / "latents.safetensors")
    own_attention = network.attn_processors
    network.set_attn_processor(padded_attention())
    average = train_denoiser(
        network, flow_loss, latents, FixedText(encoder, tokenizer, texts),
        [AS_LEARNT.get(c.group, c.group) for c in captions],
        [Rendering(clip.caption, "", 0) for clip in chosen], config, work / "network.safetensors",
    )  # fmt: skip
    average.set_attn_processor(own_attention)
    WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=autoencoder, transformer=average,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
    ).save_pretrained(part := folder / "model.part")  # fmt: skip
    part.rename(folder / "model")
