"""Networks of every supported architecture at toy size; to be called inside ComfyUI."""

import math
from typing import Any

import torch

UNET = {
    "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 48,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False,
    "adm_in_channels": None, "num_heads": 4, "num_head_channels": -1, "use_checkpoint": False,
    "use_temporal_attention": False,
}  # fmt: skip
SDXL = UNET | {
    "adm_in_channels": 2816, "num_classes": "sequential", "use_linear_in_transformer": True,
    "model_channels": 64,  # its heads always have 64
}  # fmt: skip
MMDIT = {
    "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 2048,
    "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128},
    },
    "num_patches": 32 * 32, "pos_embed_max_size": 32, "pos_embed_scaling_factor": None,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2,
    "vec_in_dim": 768, "context_in_dim": 48, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2,
    "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 10000,
    "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict, int]] = {  # ComfyUI's class, sizes, width of the pooled text
    "sd1": ("SD15", UNET, 0),
    "sdxl": ("SDXL", SDXL, 1280),
    "sd3": ("SD3", MMDIT, 2048),
    "flux": ("Flux", FLUX, 768),
}


def tiny_model(kind: str) -> Any:
    """Return a MODEL with random weights of the variance that keeps activations near 1."""
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams
    from comfy.model_patcher import ModelPatcher

    name, sizes, _ = KINDS[kind]
    sizes = dict(sizes)
    if kind == "flux" and "txt_ids_dims" in FluxParams.__dataclass_fields__:  # since 0.16
        sizes["txt_ids_dims"] = []
    config = getattr(comfy.supported_models, name)(sizes)
    config.set_inference_dtype(torch.float32, None)
    network = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for key, weight in network.diffusion_model.state_dict().items():
        if weight.ndim < 2:  # biases, and scales of norms
            weight.fill_(float(key.endswith(("weight", "scale"))))
        else:
            fan_in = math.prod(weight.shape[1:])
            weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(fan_in))
    return ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))


def tiny_conditioning(kind: str, seed: int, tokens: int = 6) -> list:
    """Return a CONDITIONING of random embeddings."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, KINDS[kind][2], generator=generator)
    further = {"pooled_output": pooled} if KINDS[kind][2] else {}
    return [[torch.randn(1, tokens, 48, generator=generator), further]]
