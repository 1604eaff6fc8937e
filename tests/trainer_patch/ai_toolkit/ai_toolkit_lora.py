"""The trainings of these tests, and how their files are looked at."""

import json
from pathlib import Path

import torch
from checkouts import CONCEPT
from safetensors import safe_open
from safetensors.torch import load_file

STEPS = 6
USUAL = {
    "network": {"type": "lora", "linear": 4, "linear_alpha": 4},
    "save": {"dtype": "float32", "save_every": 100},
    "dataset": {"caption_ext": "txt", "resolution": [64], "num_workers": 0, "cache_latents": True},
    "train": {
        "batch_size": 2, "steps": STEPS, "lr": 1e-3, "optimizer": "adamw", "dtype": "fp32",
        "noise_scheduler": "ddpm", "gradient_checkpointing": False, "disable_sampling": True,
    },
    "model": {"arch": "sd1"},
}  # fmt: skip
"""Sections of a configuration; "dataset" is the only one of `datasets`."""
IDLE = {"mem_filter": "inf", "project_concepts": "EMPTY"}
"""Options that change nothing. EMPTY is a subspace's file, and so is FILE, the concept's."""
KEPT = {"project_concepts": "FILE"}
MIXED = {
    "train": {
        "steps": STEPS // 2, "dtype": "bf16", "gradient_checkpointing": True,
        "gradient_accumulation": 2, "min_snr_gamma": 5, "optimizer": "adafactor",
        "blank_prompt_preservation": True,
        "ema_config": {"use_ema": True, "ema_decay": 0.9},
    },
    "save": {"dtype": "float16"},
    "network": {"conv": 2, "conv_alpha": 2, "dropout": 0.2},
    "dataset": {
        "num_workers": 1, "cache_latents": False, "shuffle_tokens": True,
        "caption_dropout_rate": 0.3, "flip_x": True,
    },
}  # fmt: skip
CACHED = {"train": {"cache_text_embeddings": True}, "dataset": {"cache_latents_to_disk": True}}
EMA = {"train": {"ema_config": {"use_ema": True, "ema_decay": 0.9, "use_feedback": True}}}
HALF = {"train": {"steps": STEPS // 2}}
FULL = {"log_dir": "LOGS", "logging": {"log_every": 1}, "save": {"save_every": 3},
        "trigger_word": "zzz"}  # fmt: skip
BOTH = {"project_concepts": CONCEPT, "project_force": True, "mem_filter": 0.03,
        "mem_filter_action": "downweight"}  # fmt: skip

JOBS = {
    "plain": (None, {}),
    "idle": (IDLE, {}),
    "mixed plain": (None, MIXED),
    "mixed idle": (IDLE, MIXED),
    "cached plain": (None, CACHED),
    "cached idle": (IDLE, CACHED),
    "zero": ({"mem_filter": 0}, {}),
    "both": (BOTH, FULL),
    "kept ema": (KEPT, EMA),
    "mixed kept": (KEPT, MIXED),
    "kept from plain": (KEPT, {"network": {"pretrained_lora_path": "PLAIN"}}),
    "half plain": (None, HALF | {"name": "again plain"}),
    "again plain": (None, {}),
    "half idle": (IDLE, HALF | {"name": "again idle"}),
    "again idle": (IDLE, {}),
    "half both": (BOTH, HALF | {"name": "again both"}),
    "again both": (BOTH, {}),
}
"""By name: the section `unmemorize`, None for ai-toolkit's own type, and what is unusual.

A job with another `name` leaves the files of that one, which goes on from them.
"""
REFUSED = {
    "use `type: lora`": (KEPT, {"network": {"type": "lokr"}}),
    "`train.train_text_encoder`": ({"mem_filter": "inf"}, {"train": {"train_text_encoder": True}}),
    "`train.do_cfg`": ({"mem_filter": "inf"}, {"train": {"do_cfg": True}}),
    "`model.arch: flux`": (KEPT, {"model": {"arch": "flux"}}),
    "add a `network`": (KEPT, {"network": None}),
    "`project_concept` is not an option": ({"project_concept": "sushi"}, {}),
    "--mem_filter cannot be 'high'": ({"mem_filter": "high"}, {}),
    "or force it": ({"project_concepts": CONCEPT}, {}),
    "there are subspaces for [64]": ({"project_concepts": "NARROW"}, {}),
}
"""By what is said."""


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def header(path: Path) -> dict:
    """Return the metadata of a file, each value parsed where it is JSON."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return {key: json.loads(text) if text[:1] in "{[" else text for key, text in metadata.items()}


def ups(path: Path) -> list[torch.Tensor]:
    return [each for key, each in load_file(path).items() if key.endswith("lora_up.weight")]


def largest_share(path: Path, basis: torch.Tensor) -> float:
    """Return the largest |A V| / |A|, spelt out for ai-toolkit's names."""
    shares = []
    for key, value in load_file(path).items():
        if key.endswith(("attn2_to_k.lora_down.weight", "attn2_to_v.lora_down.weight")):
            down = value.double().flatten(1)
            shares.append(sum((down @ v).square().sum() for v in basis.T) / down.square().sum())
    assert len(shares) == 32
    return max(shares).sqrt().item()
