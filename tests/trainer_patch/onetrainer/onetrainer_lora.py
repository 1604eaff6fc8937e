"""What the trainings of these tests share, and how their files are looked at."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

OFF = {"train": False, "weight_dtype": "FLOAT_32"}
USUAL = {
    "__version": 11, "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15",
    "output_model_format": "KOHYA_LORA", "output_dtype": "FLOAT_32", "tensorboard": False,
    "train_device": "cpu", "temp_device": "cpu", "train_dtype": "FLOAT_32",
    "fallback_train_dtype": "BFLOAT_16", "samples": [], "resolution": "64", "batch_size": 2,
    "epochs": 2, "learning_rate": 1e-3, "learning_rate_warmup_steps": 0, "lora_rank": 4,
    "lora_alpha": 1.0, "dataloader_threads": 1, "sample_after_unit": "NEVER",
    "backup_after_unit": "NEVER", "backup_before_save": False, "offline_mode": True,
    "unet": {"weight_dtype": "FLOAT_32"}, "vae": OFF, "text_encoder": OFF, "text_encoder_2": OFF,
    "text_encoder_3": OFF, "transformer": {"weight_dtype": "FLOAT_32"},
    "optimizer": {"optimizer": "ADAMW"},
}  # fmt: skip
"""A configuration; the default would train the text encoder too, with four times the epochs."""
STEPS = 4
EVERYTHING = {
    "train_dtype": "BFLOAT_16", "output_dtype": "BFLOAT_16", "gradient_accumulation_steps": 2,
    "epochs": 4, "unet": {"gradient_checkpointing": True}, "latent_caching": False,
    "dropout_probability": 0.2, "text_encoder": {"dropout_probability": 0.3},
    "text_encoder_layer_skip": 1, "loss_weight_fn": "MIN_SNR_GAMMA", "offset_noise_weight": 0.1,
    "ema": "CPU", "ema_update_step_interval": 1,
}  # fmt: skip
"""Much that is unusual, at once."""


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with changes to it, at any depth."""
    deep = {key: merged(first[key], second[key]) for key in first.keys() & second.keys()
            if isinstance(first[key], dict) and isinstance(second[key], dict)}  # fmt: skip
    return {**first, **second, **deep}


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def told(path: Path, about: str) -> dict[str, Any]:
    """Return what a file's header tells of "projection" or "filter"."""
    return json.loads(header(path)[f"unmemorize.{about}"])


def largest_share(path: Path, basis: torch.Tensor) -> float:
    """Return the largest |A V| / |A|, spelt out for every format that OneTrainer writes."""
    shares = []
    for key, value in load_file(path).items():
        reads_text = any(f"attn2{mark}to_{part}." in key for mark in "._" for part in "kv")
        if reads_text and any(end in key for end in ("lora_down.", "lora_A.")):
            down = value.double().flatten(1)
            shares.append(sum((down @ v).square().sum() for v in basis.T) / down.square().sum())
    assert shares
    return max(shares).sqrt().item()
