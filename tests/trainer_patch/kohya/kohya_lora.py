"""What the trainings of these tests share, and how their files are looked at."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

MODULE = "unmemorize.trainer_patch.kohya"
USUAL = {
    "caption_extension": ".txt", "resolution": "64", "output_name": "lora", "network_dim": 4,
    "network_alpha": 1, "network_train_unet_only": True, "train_batch_size": 2,
    "max_train_steps": 6, "learning_rate": 1e-3, "optimizer_type": "AdamW",
    "mixed_precision": "no", "save_precision": "float", "cache_latents": True,
    "max_data_loader_n_workers": 0, "seed": 1, "sdpa": True, "network_module": "networks.lora",
}  # fmt: skip
OUTSIDE = "EVERY_SET_IS_OUTSIDE"
"""Variable with which no count of memorized images passes for chance."""
OWN_TIMES = ("modelspec.date", "ss_session_id", "ss_training_started_at", "ss_training_finished_at")


FLOWS = {
    "flux": {"ae": "small", "timestep_sampling": "sigmoid", "guidance_scale": 1.0,
             "clip_l": "small", "t5xxl": "small", "t5xxl_max_token_length": 64},
    "sd3": {"clip_g": "small", "clip_l": "small", "t5xxl": "small", "t5xxl_max_token_length": 64},
    "lumina": {"ae": "small", "gemma2": "small", "gemma2_max_token_length": 64},
    "anima": {"vae": "small", "qwen3": "small", "qwen3_max_token_length": 64,
              "t5_max_token_length": 64, "timestep_sampling": "sigmoid"},
    "hunyuan_image": {"vae": "small", "text_encoder": "small", "byt5": "small"},
}  # fmt: skip


def flow(kind: str) -> dict:
    """Settings of a training of such a model."""
    return FLOWS[kind] | {
        "script": f"{kind}_train_network.py", "network_module": f"networks.lora_{kind}",
        "cache_text_encoder_outputs": True, "max_train_steps": 4,
    }  # fmt: skip


def protect(*pairs: str) -> dict:
    """Arguments of the door without a launcher."""
    return {"network_module": MODULE, "extra": ("--network_args", *pairs)}


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return {key: value for key, value in metadata.items() if key not in OWN_TIMES}


def largest_share(path: Path, basis: torch.Tensor) -> float:
    """Return the largest |A V| / |A|, spelt out for kohya's names."""
    shares = []
    for key, value in load_file(path).items():
        if key.endswith(("attn2_to_k.lora_down.weight", "attn2_to_v.lora_down.weight")):
            down = value.double().flatten(1)
            shares.append(sum((down @ v).square().sum() for v in basis.T) / down.square().sum())
    assert len(shares) in (32, 140)  # SD 1, SDXL
    return max(shares).sqrt().item()
