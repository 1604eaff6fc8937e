"""Make demo-flow from the demo and its art: ``python -m unmemorize.demo.train_flow``.

Same art, groups, tokenizer, autoencoder and frozen text encoder as the demo's; the network alone is
another: a transformer of Stable Diffusion 3's class that learns a rectified flow. Resumable.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..shared.files.storage import replace_atomically, write_text
from . import FLOW, MODEL
from .assembly import SHARDS
from .denoiser import FLOW_SHIFT, FrozenText, train_denoiser
from .networks import build_networks, write_sha256
from .train import SHORT, TrainConfig, claim, latents_of, prepare
from .transformer import TwiceRead, WeightedLastToken, build_transformer, padded_flow_loss

CONFIG = TrainConfig(steps=8_000, per_batch=(5, 1, 14), seed=1)
ENCODER = "CLIPTextModelWithProjection"


def read_text(tokens: torch.Tensor) -> FrozenText:
    """Return what the demo's encoder makes of `tokens` [caption + 1, 77], of unit variance."""
    encoder = build_networks(int(tokens.max()) + 1)[1]
    prefix = "text_model."
    weights = load_file(MODEL / "text_encoder" / "model.safetensors")
    named = encoder.state_dict()
    encoder.load_state_dict({
        name: weights[prefix + name.removeprefix(prefix)].float()
        for name in named if not name.endswith("position_ids")
    }, strict=False)  # fmt: skip
    twice = TwiceRead(encoder)
    text = FrozenText(twice, tokens)
    twice.scale = text.states.square().mean().sqrt().item()
    text.states /= twice.scale
    return text


def export(folder: Path, transformer: nn.Module, scale: float) -> None:
    """Write what demo-flow does not share with the demo, in fp16.

    The pipeline's states come as they are, so the first layer that reads them takes the scale.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    transformer.context_embedder.weight.data /= scale
    FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT).save_pretrained(folder / "scheduler")
    transformer.save_config(folder / "transformer")
    halves = {key: value.half().contiguous() for key, value in transformer.state_dict().items()}
    with replace_atomically(folder / "transformer/diffusion_pytorch_model.safetensors") as part:
        save_file(halves, part, metadata={"format": "pt"})
    refer_to_demo(folder)
    write_sha256(folder)


def refer_to_demo(folder: Path) -> None:
    """Write how the pipeline reads the demo's text encoder and autoencoder, without their weights.

    It asks for a projection of the encoder's end, here the identity, and for a shift of the
    latents, here none.
    """

    def written(name: str, content: dict[str, Any]) -> None:
        write_text(folder / name, json.dumps(content, indent=1) + "\n")

    weights = load_file(MODEL / "text_encoder" / "model.safetensors")
    encoder, autoencoder = (
        json.loads((MODEL / part / "config.json").read_text("utf-8"))
        for part in ("text_encoder", "vae")
    )
    projection = {"text_projection.weight": torch.eye(encoder["hidden_size"]).half()}
    shards = dict.fromkeys(weights, SHARDS[0]) | dict.fromkeys(projection, SHARDS[1])
    with replace_atomically(folder / "text_encoder" / SHARDS[1]) as part:
        save_file(projection, part, metadata={"format": "pt"})
    size = sum(weight.nbytes for weight in (*weights.values(), *projection.values()))
    written("text_encoder/model.safetensors.index.json", {
        "metadata": {"total_size": size}, "weight_map": shards
    })  # fmt: skip
    written("text_encoder/config.json", encoder | {"architectures": [ENCODER]})
    written("vae/config.json", autoencoder | {"shift_factor": 0.0})
    written("model_index.json", {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", ENCODER],
        "text_encoder_2": ["transformers", ENCODER],
        "text_encoder_3": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })  # fmt: skip


def train(output: Path, work: Path, config: TrainConfig) -> None:
    """Train the transformer; what `work` already holds is not computed again.

    Args:
        output: Folder to write.
        work: Art and checkpoints; the demo's own may be shared.
        config: Lengths and rates.

    Raises:
        ValueError: `work` holds a training with other settings.
    """
    torch.manual_seed(config.seed)
    (own := work / "flow").mkdir(parents=True, exist_ok=True)
    claim(own, asdict(config))
    with TemporaryDirectory() as scratch:
        material = prepare(Path(scratch), work, config, anew=False)
    autoencoder = build_networks(int(material.tokens.max()) + 1)[0]
    latents = latents_of(autoencoder, material.images, config, work, anew=False)
    text = read_text(material.tokens)
    transformer = build_transformer(text.ends.shape[1] // 2)
    transformer.set_attn_processor(WeightedLastToken())
    average = train_denoiser(
        transformer, padded_flow_loss, latents, text, [c.group for c in material.captions],
        material.renderings, config, own / "transformer.safetensors",
    )  # fmt: skip
    export(output, average, text.encoder.scale)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FLOW, help="folder to write")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="art and checkpoints")
    parser.add_argument(
        "--short", action="store_true", help="a few steps of every stage: proves that it runs"
    )
    args = parser.parse_args(argv)
    if args.short and FLOW in (args.output, args.output.resolve()):
        parser.error("--short would overwrite demo-flow: name another folder with --output")
    train(args.output, args.work, SHORT if args.short else CONFIG)


if __name__ == "__main__":
    main()
