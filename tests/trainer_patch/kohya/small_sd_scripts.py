"""Runs a script of sd-scripts with models small enough for a test; all else is the script's own.

python small_sd_scripts.py script SCRIPT ...   as it is
python small_sd_scripts.py door SCRIPT ...     behind the launcher

The widths of its networks are constants of its modules, and SDXL, Flux and SD3 come from single
files of fixed size: both are replaced before the script starts. It must lie in the working folder.
"""

import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path.cwd()))

DEMO = Path(__file__).resolve().parents[3] / "demo" / "model"
WIDTH = 64
"""Of the demo model's U-Net, in all blocks."""


def clip(kind, hidden: int, layers: int, projection: int):
    from transformers import CLIPTextConfig

    return kind(CLIPTextConfig(
        vocab_size=2048, hidden_size=hidden, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, projection_dim=projection, bos_token_id=2046,
        eos_token_id=2047, pad_token_id=2047,
    )).eval()  # fmt: skip


def letters():
    """Return a tokenizer of T5's kind that knows single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz,."]
    known = Tokenizer(models.Unigram([(piece, 0.0) for piece in pieces], unk_id=2))
    known.pre_tokenizer = pre_tokenizers.Metaspace()
    return T5TokenizerFast(tokenizer_object=known, extra_ids=0)


def small_sd() -> None:
    from library import original_unet

    original_unet.BLOCK_OUT_CHANNELS = (WIDTH,) * 4
    original_unet.TIMESTEP_INPUT_DIM = WIDTH
    original_unet.TIME_EMBED_DIM = 4 * WIDTH


def small_sdxl() -> None:
    from diffusers import AutoencoderKL
    from library import sdxl_original_unet, sdxl_train_util
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    sdxl_original_unet.MODEL_CHANNELS = 32
    sdxl_original_unet.TIME_EMBED_DIM = 128

    def load(*_, **__):
        torch.manual_seed(0)
        first = clip(CLIPTextModel, 768, 12, 768)
        second = clip(CLIPTextModelWithProjection, 1280, 2, 1280)
        unet = sdxl_original_unet.SdxlUNet2DConditionModel()
        vae = AutoencoderKL.from_pretrained(DEMO / "vae")
        return False, first, second, vae, unet, None, None

    sdxl_train_util._load_target_model = load


def small_t5(width: int):
    """Return a text encoder of T5's kind, and have its tokenizer be `letters`."""
    from library import strategy_base
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    def load_tokenizer(self, kind, *arguments, **kwargs):
        known = kind is not T5TokenizerFast
        return load_known(self, kind, *arguments, **kwargs) if known else letters()

    load_known = strategy_base.TokenizeStrategy._load_tokenizer
    strategy_base.TokenizeStrategy._load_tokenizer = load_tokenizer
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(
        vocab_size=64, d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )).eval()  # fmt: skip


def small_sd3() -> None:
    from library import safetensors_utils, sd3_models, sd3_utils
    from transformers import CLIPTextModelWithProjection

    t5 = small_t5(4096)
    size = sd3_models.SD3Params(
        patch_size=2, depth=2, num_patches=36864, pos_embed_max_size=192, adm_in_channels=2048,
        qk_norm="rms", x_block_self_attn_layers=[], context_embedder_in_features=4096,
        context_embedder_out_features=128, model_type="3-5-medium",
    )  # fmt: skip

    def load_mmdit(*_, **__):
        torch.manual_seed(0)
        made = sd3_models.create_sd3_mmdit(size)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.05)  # published weights are not zero
        return made

    safetensors_utils.load_safetensors = lambda *_, **__: {}
    sd3_utils.load_mmdit = load_mmdit
    sd3_utils.load_clip_l = lambda *_, **__: clip(CLIPTextModelWithProjection, 768, 2, 768)
    sd3_utils.load_clip_g = lambda *_, **__: clip(CLIPTextModelWithProjection, 1280, 2, 1280)
    sd3_utils.load_t5xxl = lambda *_, **__: t5
    sd3_utils.load_vae = lambda *_, **__: sd3_models.SDVAE()


def small_flux() -> None:
    from library import flux_models, flux_utils
    from transformers import CLIPTextModel

    flux = flux_models.FluxParams(
        in_channels=64, vec_in_dim=64, context_in_dim=32, hidden_size=64, mlp_ratio=2.0,
        num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[8, 12, 12], theta=10_000,
        qkv_bias=True, guidance_embed=True,
    )  # fmt: skip
    autoencoder = flux_models.AutoEncoderParams(
        resolution=64, in_channels=3, ch=32, out_ch=3, ch_mult=[1, 1, 1, 1], num_res_blocks=1,
        z_channels=16, scale_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    t5 = small_t5(32)

    def load_flow_model(*_, **__):
        torch.manual_seed(0)
        made = flux_models.Flux(flux)
        # Published weights are not zero there, and a zero output would have no text in it.
        torch.nn.init.normal_(made.final_layer.linear.weight, std=0.1)
        return False, made

    flux_utils.analyze_checkpoint_state = lambda *_: (False, False, (1, 1), [])
    flux_utils.load_flow_model = load_flow_model
    flux_utils.load_clip_l = lambda *_, **__: clip(CLIPTextModel, 64, 1, 64)
    flux_utils.load_t5xxl = lambda *_, **__: t5
    flux_utils.load_ae = lambda *_, **__: flux_models.AutoEncoder(autoencoder)


if __name__ == "__main__":
    _, door, script, *_ = sys.argv
    small = {"sdxl": small_sdxl, "flux": small_flux, "sd3": small_sd3}.get(
        script.split("_")[0], small_sd
    )
    small()
    del sys.argv[:2]
    if door == "door":
        sys.argv.insert(0, "")
        runpy.run_module("unmemorize.trainer_patch.kohya", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")
