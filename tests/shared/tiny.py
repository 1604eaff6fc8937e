"""Real diffusers pipelines at tiny sizes, built offline with random weights and real tokenizers."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

WORDS = "a red green cat dog house on the mat photo of with tall tree and sea".split()
CLIP_LENGTH = 16
RESOLUTION = 64
"""Small enough to sample on one core, large enough for three resolutions."""


def _byte_symbols() -> list[str]:
    """Return the 256 printable characters byte-level BPE stands on (GPT-2, CLIP)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(spare)) for b in range(256)]


@cache
def clip_tokenizer(length: int = CLIP_LENGTH) -> Any:
    """Return a CLIPTokenizer that knows WORDS whole and spells everything else."""
    from transformers import CLIPTokenizer

    symbols = _byte_symbols()
    pieces, merges = [*symbols, *(s + "</w>" for s in symbols)], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            joined = parts[0] + parts[1]
            if joined not in pieces:
                pieces.append(joined)
                merges.append(f"{parts[0]} {parts[1]}")
            parts = [joined, *parts[2:]]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    folder = Path(mkdtemp(prefix="tiny-clip-"))
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"),
        vocab_file=str(folder / "vocab.json"), merges_file=str(folder / "merges.txt"),
        model_max_length=length, pad_token="<|endoftext|>",
    )  # fmt: skip


@cache
def t5_tokenizer() -> Any:
    """Return a T5 tokenizer whose unigrams are WORDS, their halves and letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,'-"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)]
    vocab += [(f"\u2581{word}", -4.0 - i / 10) for i, word in enumerate(WORDS)]
    vocab += [(letter, -9.0) for letter in letters]
    core = Tokenizer(models.Unigram(vocab, unk_id=2))
    core.normalizer = normalizers.Replace("  ", " ")
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = T5TokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_ids=0
    )
    return tokenizer


def _clip_config(width: int = 32, projection: int = 32) -> Any:
    from transformers import CLIPTextConfig

    size = len(clip_tokenizer())
    return CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=37, projection_dim=projection,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=CLIP_LENGTH,
        bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(
        vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    ))  # fmt: skip


def _autoencoder(channels: int = 4, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 16), layers_per_block=1, latent_channels=channels,
        norm_num_groups=8, sample_size=RESOLUTION, **settings,
    )  # fmt: skip


def tiny_autoencoder() -> Any:
    """Return a real AutoencoderTiny, of the same factor as the others here."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3,
    ).eval()  # fmt: skip


def _scheduler(prediction_type: str = "epsilon", **settings: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
        "prediction_type": prediction_type, **settings,
    })  # fmt: skip


def stable_diffusion(prediction_type: str = "epsilon", seed: int = 0, **scheduler: Any) -> Any:
    """Return an SD 1.x pipeline, or SD 2.x with "v_prediction"."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
        attention_head_dim=4, norm_num_groups=8,
        use_linear_projection=prediction_type == "v_prediction",
    )  # fmt: skip
    return _ready(StableDiffusionPipeline(
        vae=_autoencoder(), text_encoder=CLIPTextModel(_clip_config()),
        tokenizer=clip_tokenizer(), unet=unet, scheduler=_scheduler(prediction_type, **scheduler),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ))  # fmt: skip


def stable_diffusion_xl(seed: int = 0, force_zeros: bool = True) -> Any:
    """Return an SDXL pipeline with both encoders."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
        norm_num_groups=8, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 32, cross_attention_dim=32 + 24,
    )  # fmt: skip
    return _ready(StableDiffusionXLPipeline(
        vae=_autoencoder(), text_encoder=CLIPTextModel(_clip_config()), tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(width=24)),
        tokenizer_2=clip_tokenizer(), unet=unet, scheduler=_scheduler(),
        force_zeros_for_empty_prompt=force_zeros, add_watermarker=False,
    ))  # fmt: skip


def stable_diffusion_3(seed: int = 0, with_t5: bool = True) -> Any:
    """Return an SD3 pipeline with its three encoders, or without T5."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=RESOLUTION // 4, patch_size=2, in_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
        joint_attention_dim=64, pooled_projection_dim=56, out_channels=4, pos_embed_max_size=32,
    )  # fmt: skip
    t5 = _t5_wide() if with_t5 else None
    return _ready(StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=CLIPTextModelWithProjection(_clip_config(projection=32)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(width=24, projection=24)),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5, tokenizer_3=t5_tokenizer() if t5 else None,
    ))  # fmt: skip


def _t5_wide() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(
        vocab_size=len(t5_tokenizer()), d_model=64, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    ))  # fmt: skip


def flux(seed: int = 0, guidance_embeds: bool = True) -> Any:
    """Return a Flux pipeline; its default size is made tiny, too."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    pipeline = _ready(FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_autoencoder(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=CLIPTextModel(_clip_config()), tokenizer=clip_tokenizer(),
        text_encoder_2=_t5(), tokenizer_2=t5_tokenizer(),
    ))  # fmt: skip
    pipeline.default_sample_size = RESOLUTION // 4
    return pipeline


def _ready(pipeline: Any) -> Any:
    """Return the pipeline without progress bar, with the text given a say in the output."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PIPELINES = {
    "sd1": stable_diffusion,
    "sd2": lambda: stable_diffusion("v_prediction"),
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
}
"""One of each family, by short name."""


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
"""Names inside a residual block of a U-Net, and in the original code."""


def original_unet_keys(unet: Any) -> dict[str, str]:
    """Return the key in an original checkpoint for every key of a U-Net of SD 1.x."""
    layers, count = unet.config.layers_per_block, len(unet.config.block_out_channels)
    places = {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }  # fmt: skip
    for level in range(count):
        for layer in range(layers):
            at = f"input_blocks.{1 + level * (layers + 1) + layer}"
            places[f"down_blocks.{level}.resnets.{layer}"] = f"{at}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"{at}.1"
        below = f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
        places[f"down_blocks.{level}.downsamplers.0.conv"] = below
        attended = unet.config.up_block_types[level].startswith("CrossAttn")
        for layer in range(layers + 1):
            at = f"output_blocks.{level * (layers + 1) + layer}"
            places[f"up_blocks.{level}.resnets.{layer}"] = f"{at}.0"
            places[f"up_blocks.{level}.attentions.{layer}"] = f"{at}.1"
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"{at}.{2 if attended else 1}.conv"
    names = {}
    for key in unet.state_dict():
        place = next(p for p in places if key.startswith(f"{p}."))
        rest = key.removeprefix(f"{place}.")
        if ".resnets." in key:
            head, _, kind = rest.rpartition(".")
            rest = f"{RESNET[head]}.{kind}"
        names[key] = f"model.diffusion_model.{places[place]}.{rest}"
    return names


def original_vae_keys(vae: Any) -> dict[str, str]:
    """Return the key in an original checkpoint for every key of an autoencoder."""
    last = len(vae.config.block_out_channels) - 1
    names = {}
    for key in vae.state_dict():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        for level in range(last + 1):
            name = name.replace(f"down_blocks.{level}.downsamplers.0.", f"down.{level}.downsample.")
            name = name.replace(f"up_blocks.{level}.upsamplers.0.", f"up.{last - level}.upsample.")
            name = name.replace(f"down_blocks.{level}.resnets.", f"down.{level}.block.")
            name = name.replace(f"up_blocks.{level}.resnets.", f"up.{last - level}.block.")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace(
            "mid_block.resnets.1", "mid.block_2"
        )
        name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
        for new, old in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
                         ("to_out.0", "proj_out")):  # fmt: skip
            name = name.replace(f"attn_1.{new}.", f"attn_1.{old}.")
        names[key] = f"first_stage_model.{name}"
    return names


def original_checkpoint(pipeline: Any) -> dict[str, torch.Tensor]:
    """Return an SD 1.x pipeline as the original code writes it, in one state dict."""
    unet, vae = pipeline.unet.state_dict(), pipeline.vae.state_dict()
    state = {new: unet[old] for old, new in original_unet_keys(pipeline.unet).items()}
    for old, new in original_vae_keys(pipeline.vae).items():
        value = vae[old]
        flat = ".mid.attn_1." in new and value.ndim == 2  # 1 x 1 convolutions, originally
        state[new] = value[:, :, None, None] if flat else value
    for key, value in pipeline.text_encoder.state_dict().items():
        plain = key.removeprefix("text_model.")
        state[f"cond_stage_model.transformer.text_model.{plain}"] = value
    return {key: value.contiguous() for key, value in state.items()}
