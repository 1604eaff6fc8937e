"""The newer diffusers pipelines at tiny sizes: real classes, random weights, tokenizers made here.

Every text encoder is of the class that the released model has, with a handful of channels.
"""

from functools import cache
from typing import Any

import tiny
import torch
from tiny import RESOLUTION, clip_tokenizer, t5_tokenizer

CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }} {% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def _of_templates() -> set[str]:
    """Return the long words of HunyuanVideo's template, which spelt would leave no room."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return {word for word in DEFAULT_PROMPT_TEMPLATE["template"].split() if len(word) > 5}


@cache
def chat_tokenizer(side: str = "right", starts: bool = False) -> Any:
    """Return a tokenizer of a chat model: WORDS whole, letters else, and a template.

    Args:
        side: Of the padding.
        starts: Put a token before every text, as those of Gemma, GLM and Llama do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("<unk>", 0.0), ("<|start|>", 0.0), ("<|end|>", 0.0), ("▁", -3.0)]
    vocab += [(f"▁{word}", -4.0 - i / 10) for i, word in enumerate(tiny.WORDS)]
    vocab += [(f"▁{word}", -5.0) for word in sorted(_of_templates() - set(tiny.WORDS))]
    vocab += [(letter, -9.0) for letter in letters]
    core = Tokenizer(models.Unigram(vocab, unk_id=1))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    if starts:
        core.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", pair="<|start|> $A $B", special_tokens=[("<|start|>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<|start|>",
        eos_token="<|end|>", padding_side=side, chat_template=CHAT, model_max_length=1024,
    )  # fmt: skip


def _language(kind: str, model: str, width: int = 32, layers: int = 2, **settings: Any) -> Any:
    """Return a language model of transformers by the names of its config and class."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{
        "vocab_size": len(chat_tokenizer()), "hidden_size": width, "intermediate_size": 37,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 2,
        "eos_token_id": 3, **settings,
    })  # fmt: skip
    return getattr(transformers, model)(config)


def _qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(chat_tokenizer()), "hidden_size": 32, "intermediate_size": 37,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 2,
            "eos_token_id": 3,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2],
                                "rope_theta": 1e4},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 32, "patch_size": 14, "fullatt_block_indexes": [0],
        },
        image_token_id=1, video_token_id=1, vision_start_token_id=2, vision_end_token_id=3,
    ))  # fmt: skip


def _long_clip(**settings: Any) -> Any:
    """Return CLIP's configuration with the 248 positions of HiDream's."""
    config = tiny._clip_config(**settings)
    config.max_position_embeddings = 248
    return config


def _umt5(width: int = 32) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    ))  # fmt: skip


def _euler(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **settings})


def _sized(pipeline: Any) -> Any:
    """Return the pipeline, ready, with a default size as tiny as it is.

    Layers that training starts from zero would keep the text from having a say.
    """
    pipeline = tiny._ready(pipeline)
    for weight in pipeline.transformer.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    if hasattr(pipeline, "default_sample_size"):
        pipeline.default_sample_size = RESOLUTION // 4
    return pipeline


def _made(name: str, **parts: Any) -> Any:
    import diffusers

    return _sized(getattr(diffusers, name)(**parts))


def qwen_image(seed: int = 0) -> Any:
    """Return a Qwen-Image pipeline."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    torch.manual_seed(seed)
    return _made(
        "QwenImagePipeline", scheduler=_euler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.2, 1.0],
        ),
        text_encoder=_qwen_vl(), tokenizer=chat_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
        ),
    )  # fmt: skip


def z_image(seed: int = 0) -> Any:
    """Return a Z-Image pipeline."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=32, axes_dims=[8, 4, 4], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    for name, weight in transformer.named_parameters():
        if name.endswith("pad_token"):  # empty memory at first
            torch.nn.init.normal_(weight, std=0.02)
    return _made(
        "ZImagePipeline", scheduler=_euler(use_dynamic_shifting=False),
        vae=tiny._autoencoder(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=_language("Qwen3", "Qwen3Model"), tokenizer=chat_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def _flux2_parts(text_width: int, guidance_embeds: bool) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    return {
        "scheduler": _euler(use_dynamic_shifting=True),
        "vae": AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 16, 16), layers_per_block=1, latent_channels=4,
            norm_num_groups=8, sample_size=RESOLUTION,
        ),
        "transformer": Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=text_width, axes_dims_rope=(4, 4, 4, 4),
            timestep_guidance_channels=32, guidance_embeds=guidance_embeds,
        ),
    }  # fmt: skip


def flux2(seed: int = 0) -> Any:
    """Return a Flux.2 pipeline; its chat model has as many layers as it takes states of."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(seed)
    text = Mistral3ForConditionalGeneration(Mistral3Config(
        text_config={
            "model_type": "mistral", "vocab_size": len(chat_tokenizer()), "hidden_size": 8,
            "intermediate_size": 16, "num_hidden_layers": 30, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 2048,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28, "patch_size": 14,
        },
    ))  # fmt: skip
    return _made(
        "Flux2Pipeline", text_encoder=text, tokenizer=chat_tokenizer(), **_flux2_parts(24, True)
    )


def flux2_klein(seed: int = 0, distilled: bool = False) -> Any:
    """Return a Flux.2 Klein pipeline."""
    torch.manual_seed(seed)
    text = _language("Qwen3", "Qwen3ForCausalLM", width=8, layers=27, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=4)  # fmt: skip
    return _made(
        "Flux2KleinPipeline", text_encoder=text, tokenizer=chat_tokenizer(),
        is_distilled=distilled, **_flux2_parts(24, False),
    )  # fmt: skip


def chroma(seed: int = 0) -> Any:
    """Return a Chroma pipeline."""
    from diffusers import ChromaTransformer2DModel

    torch.manual_seed(seed)
    return _made(
        "ChromaPipeline", scheduler=_euler(use_dynamic_shifting=True),
        vae=tiny._autoencoder(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=tiny._t5(), tokenizer=t5_tokenizer(),
        transformer=ChromaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
        ),
    )  # fmt: skip


def flux_kontext(seed: int = 0) -> Any:
    """Return a Flux Kontext pipeline."""
    import diffusers

    parts = tiny.flux(seed).components
    return _sized(diffusers.FluxKontextPipeline(**parts))


def lumina2(seed: int = 0) -> Any:
    """Return a Lumina Image 2 pipeline."""
    from diffusers import Lumina2Transformer2DModel

    torch.manual_seed(seed)
    return _made(
        "Lumina2Pipeline", scheduler=_euler(use_dynamic_shifting=True),
        vae=_eight(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=_language("Gemma2", "Gemma2Model"), tokenizer=chat_tokenizer("right", True),
        transformer=Lumina2Transformer2DModel(
            sample_size=16, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6),
            axes_lens=(512, 64, 64), cap_feat_dim=32,
        ),
    )  # fmt: skip


def sana(seed: int = 0) -> Any:
    """Return a Sana pipeline."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel

    torch.manual_seed(seed)
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8), encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()), upsample_block_type="interpolate",
        downsample_block_type="stride_conv", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.4,
    )  # fmt: skip
    return _made(
        "SanaPipeline", vae=vae, tokenizer=chat_tokenizer("right", True),
        text_encoder=_language("Gemma2", "Gemma2Model"),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
            num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=32, sample_size=16, patch_size=1,
        ),
    )  # fmt: skip


def pixart_sigma(seed: int = 0) -> Any:
    """Return a PixArt Sigma pipeline."""
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    torch.manual_seed(seed)
    return _made(
        "PixArtSigmaPipeline", vae=tiny._autoencoder(), text_encoder=tiny._t5(),
        tokenizer=t5_tokenizer(), scheduler=DPMSolverMultistepScheduler(),
        transformer=PixArtTransformer2DModel(
            sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8,
            num_attention_heads=4, caption_channels=32, in_channels=4, cross_attention_dim=32,
            out_channels=8, norm_type="ada_norm_single", num_embeds_ada_norm=1000,
            use_additional_conditions=False,
        ),
    )  # fmt: skip


def aura_flow(seed: int = 0) -> Any:
    """Return an AuraFlow pipeline."""
    from diffusers import AuraFlowTransformer2DModel

    torch.manual_seed(seed)
    return _made(
        "AuraFlowPipeline", vae=tiny._autoencoder(), text_encoder=_umt5(),
        tokenizer=t5_tokenizer(), scheduler=_euler(shift=1.73),
        transformer=AuraFlowTransformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1,
            num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=32, pos_embed_max_size=1024,
        ),
    )  # fmt: skip


def hidream_image(seed: int = 0) -> Any:
    """Return a HiDream pipeline with its four encoders."""
    from diffusers import HiDreamImageTransformer2DModel
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=8, num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=56,
        num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16), llama_layers=(0, 1), force_inference_output=True,
    )  # fmt: skip
    return _made(
        "HiDreamImagePipeline", scheduler=_euler(), vae=tiny._autoencoder(shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(_long_clip()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_long_clip(width=24, projection=24)),
        tokenizer_2=clip_tokenizer(), text_encoder_3=tiny._t5(), tokenizer_3=t5_tokenizer(),
        text_encoder_4=_language("Llama", "LlamaForCausalLM", width=16, head_dim=4),
        tokenizer_4=chat_tokenizer(), transformer=transformer,
    )  # fmt: skip


def hunyuan_image(seed: int = 0) -> Any:
    """Return a HunyuanImage 2.1 pipeline, guided by its guider."""
    from diffusers import (
        AdaptiveProjectedMixGuidance,
        AutoencoderKLHunyuanImage,
        HunyuanImageTransformer2DModel,
    )

    torch.manual_seed(seed)
    return _made(
        "HunyuanImagePipeline", scheduler=_euler(),
        vae=AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32),
            layers_per_block=1, spatial_compression_ratio=4, sample_size=RESOLUTION,
            scaling_factor=0.5,
        ),
        text_encoder=_qwen_vl(), tokenizer=chat_tokenizer(),
        text_encoder_2=tiny._t5(), tokenizer_2=t5_tokenizer(),
        transformer=HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
            num_layers=1, num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0,
            patch_size=(1, 1), text_embed_dim=32, text_embed_2_dim=32, rope_axes_dim=(8, 8),
        ),
        guider=AdaptiveProjectedMixGuidance(), ocr_guider=AdaptiveProjectedMixGuidance(),
    )  # fmt: skip


def cogview4(seed: int = 0) -> Any:
    """Return a CogView4 pipeline."""
    from diffusers import CogView4Transformer2DModel

    torch.manual_seed(seed)
    return _made(
        "CogView4Pipeline", tokenizer=chat_tokenizer("left", True), vae=tiny._autoencoder(),
        text_encoder=_language("Glm", "GlmModel"),
        scheduler=_euler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
        transformer=CogView4Transformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, text_embed_dim=32, time_embed_dim=8, condition_dim=4,
            sample_size=16, rope_axes_dim=(16, 16),
        ),
    )  # fmt: skip


def hunyuan_dit(seed: int = 0) -> Any:
    """Return a HunyuanDiT pipeline."""
    from diffusers import DDPMScheduler, HunyuanDiT2DModel
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    bert = BertModel(BertConfig(
        vocab_size=len(chat_tokenizer()), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=37, pad_token_id=0,
    ))  # fmt: skip
    return _made(
        "HunyuanDiTPipeline", vae=_eight(),
        text_encoder=bert, tokenizer=chat_tokenizer(), text_encoder_2=tiny._t5(),
        tokenizer_2=t5_tokenizer(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, scheduler=DDPMScheduler(prediction_type="v_prediction"),
        transformer=HunyuanDiT2DModel(
            sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8,
            num_attention_heads=4, in_channels=4, cross_attention_dim=32,
            cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=32,
            activation_fn="gelu-approximate",
        ),
    )  # fmt: skip


def _eight(**settings: Any) -> Any:
    """Return an autoencoder of factor 8, which Lumina 2 and HunyuanDiT take for granted."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4,
        norm_num_groups=8, sample_size=RESOLUTION, **settings,
    )  # fmt: skip


def ernie_image(seed: int = 0) -> Any:
    """Return an Ernie-Image pipeline without the model that rewrites prompts."""
    from diffusers import ErnieImageTransformer2DModel

    torch.manual_seed(seed)
    return _made(
        "ErnieImagePipeline", vae=_flux2_parts(24, False)["vae"], tokenizer=chat_tokenizer(),
        text_encoder=_language("Mistral", "MistralModel"), scheduler=_euler(),
        transformer=ErnieImageTransformer2DModel(
            hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=64,
            in_channels=16, out_channels=16, text_in_dim=32, rope_axes_dim=(8, 4, 4),
        ),
    )  # fmt: skip


def wan(seed: int = 0) -> Any:
    """Return a Wan 2.1 pipeline."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    torch.manual_seed(seed)
    return _made(
        "WanPipeline", tokenizer=t5_tokenizer(), text_encoder=_umt5(),
        vae=AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.2, 1.0],
        ),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=32, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        ),
    )  # fmt: skip


def ltx(seed: int = 0) -> Any:
    """Return an LTX-Video pipeline."""
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    torch.manual_seed(seed)
    return _made(
        "LTXPipeline", scheduler=_euler(use_dynamic_shifting=True), text_encoder=tiny._t5(),
        tokenizer=t5_tokenizer(),
        vae=AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False), patch_size=1,
        ),
        transformer=LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8,
            cross_attention_dim=32, num_layers=1, caption_channels=32,
        ),
    )  # fmt: skip


def hunyuan_video(seed: int = 0) -> Any:
    """Return a HunyuanVideo pipeline."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    return _made(
        "HunyuanVideoPipeline", scheduler=_euler(shift=7.0),
        text_encoder=_language("Llama", "LlamaModel", layers=3), tokenizer=chat_tokenizer(),
        text_encoder_2=CLIPTextModel(_long_clip(width=8)),
        tokenizer_2=clip_tokenizer(),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
            norm_num_groups=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4, mid_block_add_attention=False,
        ),
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10,
            num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=32,
            pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), patch_size=1,
        ),
    )  # fmt: skip


IMAGES = {
    "qwen_image": qwen_image, "z_image": z_image, "flux2": flux2, "flux2_klein": flux2_klein,
    "chroma": chroma, "flux_kontext": flux_kontext, "lumina2": lumina2, "sana": sana,
    "pixart_sigma": pixart_sigma, "aura_flow": aura_flow, "hidream_image": hidream_image,
    "hunyuan_image": hunyuan_image, "cogview4": cogview4, "hunyuan_dit": hunyuan_dit,
    "ernie_image": ernie_image,
}  # fmt: skip
VIDEOS = {"wan": wan, "ltx": ltx, "hunyuan_video": hunyuan_video}
FRAMES = 9
"""Of a clip: some latent frames for each of these autoencoders."""
