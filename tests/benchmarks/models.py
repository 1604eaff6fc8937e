"""What detection costs beyond the network, family by family: ``make bench NAME=models``.

    ARGS="--families sdxl flux2"    some of them

Real classes with random weights, wide enough that the network and not Python takes the time. The
network calls of one detection are kept and repeated alone; the time of the whole detection over
that of these calls is the figure, 1.00 if everything else cost nothing.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from figures import ROOT, command_of, plain, record
from scores.speed import median_of, seconds
from torch import nn
from tqdm import tqdm
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect

sys.path.insert(0, str(ROOT / "tests" / "shared"))
import tiny
import tiny_families

RESOLUTION = 128
PROMPTS = 16
SEEDS = (0, 1)
REPEATS = 7
HEADS = 24
"""Of the wide transformers; each keeps the width of one head, which its positions are made for."""
MODELS = {**tiny.PIPELINES, **tiny_families.IMAGES}
FAMILIES = ("sd1", "sdxl", "sd3", "flux", "flux2", "qwen_image", "z_image", "lumina2")


def widened(network: nn.Module) -> nn.Module:
    """Return a network of the same class and text width with several times the channels."""
    config = network.config
    if "block_out_channels" in config:
        change = {"block_out_channels": [4 * width for width in config.block_out_channels]}
    elif "n_heads" in config:
        width = config.dim // config.n_heads * HEADS
        change = {"dim": width, "n_heads": HEADS, "n_kv_heads": HEADS}
    elif "hidden_size" in config:
        width = config.hidden_size // config.num_attention_heads * HEADS
        change = {"hidden_size": width, "num_attention_heads": HEADS, "num_kv_heads": HEADS // 2}
    else:
        change = {"num_attention_heads": HEADS}
        if "caption_projection_dim" in config:
            change["caption_projection_dim"] = HEADS * config.attention_head_dim
    torch.manual_seed(0)
    return type(network).from_config({**config, **change}).eval()


def wide_denoiser(family: str) -> PipelineDenoiser:
    """Return a denoiser of a family whose network is wide."""
    pipeline = MODELS[family]()
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    pipeline.register_modules(**{name: widened(getattr(pipeline, name))})
    return PipelineDenoiser(pipeline, resolution=RESOLUTION)


@contextmanager
def noted(network: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Yield what the network is called with inside the block."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = network.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def measure(family: str) -> dict[str, Any]:
    """Return the figures of one family."""
    denoiser = wide_denoiser(family)
    network = denoiser.family.network
    words = tiny.WORDS
    texts = [f"a {words[i % len(words)]} {words[-1 - i % 7]}" for i in range(PROMPTS)]
    config = DetectionConfig(seeds=SEEDS)

    def ours() -> object:
        return detect(denoiser, texts, config)

    ours()
    with noted(network) as calls:
        ours()

    @torch.inference_mode()
    def bare() -> None:
        for args, kwargs in calls:
            network(*args, **kwargs)

    ways: dict[str, Callable[[], object]] = {"ours": ours, "bare": bare}
    # In turns, because the speed of a machine drifts.
    times = [{name: seconds(way) for name, way in ways.items()} for _ in range(REPEATS)]
    bare_seconds = statistics.median(t["bare"] for t in times)
    return {
        f"models.{family}.time_over_bare_forwards": median_of(
            [t["ours"] / t["bare"] for t in times]
        ),
        f"grid.models.{family}.bare_seconds": plain(bare_seconds, REPEATS),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the chosen families; each one's figures are written at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--output", type=Path, help="takes the figures, for a trial")
    args = parser.parse_args(argv)
    logging.getLogger("unmemorize").setLevel(logging.ERROR)
    for family in tqdm(args.families, desc="families"):
        record(measure(family), command_of("models", argv), output=args.output)


if __name__ == "__main__":
    main()
