"""Runs a script of sd-scripts with models small enough for a test; all else is the script's own.

python small_sd_scripts.py script SCRIPT ...   as it is
python small_sd_scripts.py door SCRIPT ...     behind the launcher

The widths of its networks are constants of its modules, and the other models come from single
files of fixed size: both are replaced before the script starts. It must lie in the working folder.
"""

import inspect
import os
import runpy
import sys
from pathlib import Path

import torch
from kohya_lora import OUTSIDE

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


def small_autoencoder():
    """Return one of Flux' kind."""
    from library import flux_models

    return flux_models.AutoEncoder(flux_models.AutoEncoderParams(
        resolution=64, in_channels=3, ch=32, out_ch=3, ch_mult=[1, 1, 1, 1], num_res_blocks=1,
        z_channels=16, scale_factor=0.3611, shift_factor=0.1159,
    ))  # fmt: skip


def drawn(network):
    """Return a network whose every weight is drawn: published ones are not zero."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def small_lumina() -> None:
    from library import lumina_models, lumina_util, strategy_lumina
    from transformers import Gemma2Config, Gemma2Model

    size = lumina_models.LuminaParams(
        in_channels=16, dim=48, n_layers=1, n_heads=2, n_kv_heads=1, axes_dims=[8, 8, 8],
        axes_lens=[300, 512, 512], qk_norm=True, cap_feat_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    gemma = Gemma2Model(Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )).eval()  # fmt: skip

    class Tokenizer:
        @staticmethod
        def from_pretrained(*_, **__):
            return letters()

    strategy_lumina.AutoTokenizer = Tokenizer
    lumina_util.load_lumina_model = lambda *_, **__: drawn(
        lumina_models.NextDiT_2B_GQA_patch2_Adaln_Refiner(size)
    )
    lumina_util.load_gemma2 = lambda *_, **__: gemma
    lumina_util.load_ae = lambda *_, **__: small_autoencoder()


def small_anima() -> None:
    from library import anima_models, anima_train_utils, anima_utils, qwen_image_autoencoder_kl
    from transformers import Qwen3Config, Qwen3Model

    adapter = anima_models.LLMAdapter
    anima_models.LLMAdapter = lambda **_: adapter(32, 32, 32, 1, num_heads=2, self_attn=True)
    torch.manual_seed(0)
    qwen = Qwen3Model(Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )).eval()  # fmt: skip

    def load_anima_model(*_, **__):
        return drawn(anima_models.Anima(
            max_img_h=64, max_img_w=64, max_frames=1, in_channels=16, out_channels=16,
            patch_spatial=2, patch_temporal=1, model_channels=64, num_blocks=1, num_heads=2,
            crossattn_emb_channels=32, pos_emb_cls="rope3d", use_adaln_lora=True,
            adaln_lora_dim=16, rope_enable_fps_modulation=False, use_llm_adapter=True,
        ))  # fmt: skip

    def load_vae(*_, **__):
        torch.manual_seed(0)
        return qwen_image_autoencoder_kl.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)

    anima_utils.load_anima_model = load_anima_model
    anima_utils.load_qwen3_text_encoder = lambda *_, **__: (qwen, None)
    anima_utils.load_qwen3_tokenizer = anima_utils.load_t5_tokenizer = lambda *_: letters()
    anima_train_utils.load_qwen_image_vae = load_vae


def narrow(module, name: str, replaced: dict[str, str]) -> None:
    """Write a class of a module anew with other constants: its widths are in its source."""
    source = inspect.getsource(getattr(module, name))
    for old, new in replaced.items():
        assert old in source, old
        source = source.replace(old, new)
    exec(source, vars(module))


def small_hunyuan() -> None:
    from library import (
        hunyuan_image_models,
        hunyuan_image_text_encoder,
        hunyuan_image_vae,
        strategy_base,
    )  # fmt: skip
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    narrow(hunyuan_image_models, "HYImageDiffusionTransformer", {
        "self.hidden_size = 3584": "self.hidden_size = 64", "heads_num = 28": "heads_num = 2",
        "_depth = 20": "_depth = 1", "_depth = 40": "_depth = 1",
        "text_states_dim = 3584": "text_states_dim = 32", "[64, 64]": "[16, 16]", "2048": "64",
    })  # fmt: skip
    narrow(hunyuan_image_vae, "HunyuanVAE2D", {
        "(128, 256, 512, 512, 1024, 1024)": "(64, 64, 64, 64, 128, 128)",
    })  # fmt: skip
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    seen = {"hidden_size": 32, "out_hidden_size": 32, "depth": 1, "num_heads": 2,
            "intermediate_size": 32}  # fmt: skip
    rope = {"type": "default", "mrope_section": [2, 3, 3]}
    torch.manual_seed(0)
    qwen = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            **text,
            vision_config=seen,
            rope_scaling=rope,
            vision_start_token_id=60,
            vision_end_token_id=61,
            image_token_id=62,
            video_token_id=63,
        )
    ).eval()

    def load_model(*_, **__):
        return drawn(hunyuan_image_models.HYImageDiffusionTransformer())

    def load_vae(*_, **__):
        torch.manual_seed(0)
        return hunyuan_image_vae.HunyuanVAE2D()

    byt5 = small_t5(32)
    strategy_base.TokenizeStrategy._load_tokenizer = lambda *_, **__: letters()
    hunyuan_image_text_encoder.load_qwen2_5_vl = lambda *_, **__: (None, qwen)
    hunyuan_image_text_encoder.load_byt5 = lambda *_, **__: (None, byt5)
    hunyuan_image_vae.load_vae = load_vae
    hunyuan_image_models.load_hunyuan_image_model = load_model


def small_flux() -> None:
    from library import flux_models, flux_utils
    from transformers import CLIPTextModel

    flux = flux_models.FluxParams(
        in_channels=64, vec_in_dim=64, context_in_dim=32, hidden_size=64, mlp_ratio=2.0,
        num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[8, 12, 12], theta=10_000,
        qkv_bias=True, guidance_embed=True,
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
    flux_utils.load_ae = lambda *_, **__: small_autoencoder()


if __name__ == "__main__":
    _, door, script, *_ = sys.argv
    small = {
        "sdxl": small_sdxl, "flux": small_flux, "sd3": small_sd3, "lumina": small_lumina,
        "anima": small_anima, "hunyuan": small_hunyuan,
    }  # fmt: skip
    small.get(script.split("_")[0], small_sd)()
    if OUTSIDE in os.environ:
        from unmemorize.shared.training.filter import watch

        watch.RARE = 2.0
    del sys.argv[:2]
    if door == "door":
        sys.argv.insert(0, "")
        runpy.run_module("unmemorize.trainer_patch.kohya", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")
