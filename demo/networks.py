"""The networks of the demo model: topology of Stable Diffusion 1.x, 64 channels wide.

Rombach et al., CVPR 2022. Classic key names throughout, so that diffusers, ComfyUI and the trainers
read the files that `export` writes.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..shared.files.storage import replace_atomically
from .data import RESOLUTION

VOCABULARY = 2048
MAX_TOKENS = 77
SCALING_FACTOR = 0.18215  # of SD 1.x, hard-coded by the programs that read its latents
START, END = "<|startoftext|>", "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # as CLIP splits words


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


def build_autoencoder(
    side: int = RESOLUTION, channels: Sequence[int] = (64, 64, 64, 64), latent_channels: int = 4
) -> nn.Module:
    """Return an autoencoder with random weights; every level but the last halves the image."""
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels), layers_per_block=1, latent_channels=latent_channels,
        norm_num_groups=32, sample_size=side, scaling_factor=SCALING_FACTOR,
    )  # fmt: skip
    start_as_identity(autoencoder)
    return autoencoder


def text_config(vocabulary: int, width: int = 128, layers: int = 3, positions: int = MAX_TOKENS):
    """Return the configuration of a CLIP text encoder with heads of 32 channels."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=layers, num_attention_heads=width // 32,
        max_position_embeddings=positions, hidden_act="quick_gelu", bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
        architectures=["CLIPTextModel"],  # trainers choose the encoder's class by it
    )  # fmt: skip


def build_networks(vocabulary: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return autoencoder, text encoder and U-Net with random weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    autoencoder = build_autoencoder()
    text_encoder = CLIPTextModel(text_config(vocabulary))
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8, block_out_channels=(64, 64, 64, 64), layers_per_block=2,
        cross_attention_dim=128, attention_head_dim=8, norm_num_groups=32,
    )  # fmt: skip
    start_as_identity(unet)
    predict_input(unet)
    return autoencoder, text_encoder, unet


@torch.no_grad()
def start_as_identity(network: nn.Module) -> None:
    """Let every residual branch begin at zero and every resampling at plain averaging or copying.

    Latent diffusion's own code begins residual branches at zero, diffusers' classes do not. From
    their start the autoencoder spends its first thousand steps on brightness alone.
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
        for branch, last in last_of_branch.items():
            if isinstance(module, branch) and (layer := last(module)) is not None:
                layer.weight.zero_()
                layer.bias.zero_()
        if isinstance(module, Upsample2D):
            nn.init.dirac_(module.conv.weight)
        elif isinstance(module, Downsample2D):
            module.conv.weight.zero_()
            module.conv.weight.diagonal()[:2, :2] = 0.25
    if hasattr(network, "quant_conv"):
        # Nearly deterministic latents: noise of variance 1 would drown the colours for long.
        variances = slice(network.config.latent_channels, None)
        network.quant_conv.weight[variances].zero_()
        network.quant_conv.bias[variances].fill_(-5.0)


@torch.no_grad()
def predict_input(unet: nn.Module) -> None:
    """Let the U-Net begin by answering its own input, normalised: the noise, where noise is strong.

    Near the end of the schedule x is noise to 99.8 %, and an error of 1 % there is an error of
    15 % in the predicted image. Learning the identity to that precision through the last
    normalisation and activation takes long; silu(z) - silu(-z) = z gives it from the first step.
    """
    channels = unet.config.in_channels
    # Each group of the last normalisation holds two channels: x and -x of a latent channel.
    plus = torch.arange(channels) * 2
    last = unet.up_blocks[-1].resnets[-1]
    for conv in (unet.conv_in, last.conv_shortcut):
        conv.weight[: 2 * channels] = 0
        conv.bias[: 2 * channels] = 0
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()
    for sign, row in ((1.0, plus), (-1.0, plus + 1)):
        unet.conv_in.weight[row, torch.arange(channels), 1, 1] = sign
        # The last block sees its own state and then, joined on, what `conv_in` made.
        last.conv_shortcut.weight[row, last.conv_shortcut.in_channels // 2 + row] = 1.0
        unet.conv_out.weight[torch.arange(channels), row, 1, 1] = sign


def build_scheduler(prediction_type: str = "epsilon"):
    """Return the scheduler of SD 1.x, or that of 2.x, which predicts "v_prediction"."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip


@torch.no_grad()
def normalise_latents(autoencoder: nn.Module, std: float) -> None:
    """Rescale the latents inside the autoencoder so that SD's own scaling factor fits them.

    Exact: the two 1x1 convolutions around the latent take the factor, the decoded image stays.
    """
    factor = 1 / (std * SCALING_FACTOR)
    channels = autoencoder.config.latent_channels
    means, log_variances = slice(0, channels), slice(channels, None)
    autoencoder.quant_conv.weight[means] *= factor
    autoencoder.quant_conv.bias[means] *= factor
    autoencoder.quant_conv.bias[log_variances] += 2 * math.log(factor)
    autoencoder.post_quant_conv.weight /= factor


def export(folder: Path, autoencoder: nn.Module, text_encoder: nn.Module, unet: nn.Module) -> None:
    """Write diffusers folders in fp16 with the classic key names every reader knows."""
    build_scheduler().save_pretrained(folder / "scheduler")
    autoencoder.save_config(folder / "vae")
    unet.save_config(folder / "unet")
    # The files are fp16, and next to diffusers' float32 parts a text encoder that keeps their dtype
    # fails. transformers 5 reads the first name, 4 the second.
    config = text_encoder.config.to_dict() | {"dtype": "float32", "torch_dtype": "float32"}
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    (folder / "text_encoder" / "config.json").write_text(
        json.dumps(config, indent=1) + "\n", "utf-8"
    )
    # transformers 5 drops this prefix; older readers then start from random weights.
    prefix = "text_model."
    text = {
        prefix + key.removeprefix(prefix): value
        for key, value in text_encoder.state_dict().items()
        if not key.endswith("position_ids")
    }
    for name, tensors in (
        ("vae/diffusion_pytorch_model", autoencoder.state_dict()),
        ("unet/diffusion_pytorch_model", unet.state_dict()),
        ("text_encoder/model", text),
    ):
        with replace_atomically(folder / f"{name}.safetensors") as part:
            halves = {key: value.half().contiguous() for key, value in tensors.items()}
            save_file(halves, part, metadata={"format": "pt"})
    components = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0"}
    index |= {**components, "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def write_sha256(folder: Path) -> None:
    """Write the sha256 of every weight file of the model, by which `demo.verify` knows it."""
    sums = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    (folder / "sha256.json").write_text(json.dumps(sums, indent=1) + "\n", "utf-8")
