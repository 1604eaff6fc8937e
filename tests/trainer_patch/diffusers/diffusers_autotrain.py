"""A real training script that pip can fetch: diffusers' DreamBooth script, as AutoTrain carries it.

Run with ``fetch`` it downloads the package and unpacks it; with a script's options, it trains.
Nothing is installed: the package pins most of what it names, and the script needs little of it.
"""

import argparse
import importlib
import importlib.machinery
import logging
import shutil
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TREE = Path(__file__).resolve().parents[3] / "build" / "autotrain"
"""Folder of the unpacked wheels."""
WHEELS = (
    ("--require-hashes", "autotrain-advanced==0.8.19 "
     "--hash=sha256:0b8d0cde0c837d6c1f8d632c15bfb4b36018f841b5d3cc0f6dfd4e3f7ccaeed1"),
    ("--only-binary=:all:", "torchvision==0.28.0"),
)  # fmt: skip
"""What pip is asked for. Of torchvision only what is written in Python is used, so that it need not
match torch; installed, transformers would import all of it in every other test."""
DEFAULTS = {
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "adam_weight_decay": 1e-2,
    "allow_tf32": False, "center_crop": False, "checkpoints_total_limit": None,
    "class_labels_conditioning": None, "enable_xformers_memory_efficient_attention": False,
    "gradient_checkpointing": False, "hub_token": None, "learning_rate": 1e-2,
    "logging_dir": "logs", "lr_num_cycles": 1, "lr_power": 1.0, "lr_scheduler": "constant",
    "lr_warmup_steps": 0, "max_grad_norm": 1.0, "num_train_epochs": 1,
    "num_validation_images": 1, "pretrained_vae_model_name_or_path": None,
    "prior_generation_precision": None, "prior_loss_weight": 1.0, "rank": 4,
    "report_to": "tensorboard", "revision": None, "sample_batch_size": 2, "scale_lr": False,
    "text_encoder_use_attention_mask": False, "tokenizer_max_length": None,
    "tokenizer_name": None, "use_8bit_adam": False, "validation_epochs": 50,
    "validation_images": None, "validation_prompt": None, "variant": None,
    "train_text_encoder": False, "mixed_precision": "no",
}  # fmt: skip
"""Of the options that the tests leave alone."""


def fetch() -> None:
    """Download the wheels, let pip compare the script's sha256, and unpack them."""
    TREE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TREE.parent) as work:
        for option, wanted in WHEELS:
            (Path(work) / "requirements.txt").write_text(f"{wanted}\n", "utf-8")
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                 "--no-deps", option, "--requirement", "requirements.txt"],
                check=True, cwd=work,
            )  # fmt: skip
        for path in Path(work).glob("*.whl"):
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(Path(work) / "tree")
        shutil.rmtree(TREE, ignore_errors=True)
        (Path(work) / "tree").rename(TREE)


@contextmanager
def package(name: str) -> Iterator[types.ModuleType]:
    """Let modules of an unpacked package be imported, without what its own __init__ asks for."""
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    made.__path__ = [str(TREE / name)]
    before = sys.modules.get(name)
    sys.modules[name] = made
    try:
        yield made
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def train() -> None:
    """Train as the package would, with options as diffusers' own script has them."""
    parser = argparse.ArgumentParser()
    for name in ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt",
                 "output_dir", "class_data_dir", "class_prompt",
                 "resume_from_checkpoint"):  # fmt: skip
        parser.add_argument(f"--{name}")
    for name, value in (("resolution", 64), ("train_batch_size", 2), ("max_train_steps", 4),
                        ("seed", 3), ("checkpointing_steps", 500), ("num_class_images", 2),
                        ("gradient_accumulation_steps", 1),
                        ("dataloader_num_workers", 0)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    for name in ("with_prior_preservation", "pre_compute_text_embeddings"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.set_defaults(**DEFAULTS)
    # First: it looks for torchvision while it is imported, and must not find a part of it.
    from diffusers import StableDiffusionPipeline  # noqa: F401

    with package("torchvision"), package("autotrain") as autotrain:
        autotrain.logger = logging.getLogger("autotrain")
        script = importlib.import_module("autotrain.trainers.dreambooth.train")
    script.main(parser.parse_args())


if __name__ == "__main__":
    fetch() if sys.argv[1:] == ["fetch"] else train()
