"""Subspaces, regions and concepts of the demo model, as files: arbitrary but fixed."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from unmemorize import demo
from unmemorize.shared.training.concept.adapter import (
    ConceptAdapter,
    adapted_layers,
    weight_samples,
)
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.layers.fitting import layers_without_text
from unmemorize.shared.training.layers.regions import ConceptRegions
from unmemorize.shared.training.layers.subspaces import LayerSubspaces

WIDTH = json.loads((demo.MODEL / "unet" / "config.json").read_text("utf-8"))["cross_attention_dim"]
"""Of the demo model's text states."""


def make_subspace(folder: Path, width: int, rank: int = 5) -> Path:
    """Save some subspace; rank 0 is the empty one."""
    generator = torch.Generator().manual_seed(7)
    columns = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    path = folder / f"subspace{rank}.safetensors"
    ConceptSubspace(basis=torch.linalg.qr(columns).Q[:, :rank]).save(path)
    return path


def make_layers(folder: Path, rank: int = 3) -> Path:
    """Save some subspace for each layer of the demo's network that reads no text."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(demo.MODEL / "unet")
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(config)
    generator, bases = torch.Generator().manual_seed(9), {}
    for name, layer in layers_without_text(network).items():
        width = layer.weight.shape[1]
        columns = torch.randn(width, rank, generator=generator, dtype=torch.float64)
        bases[name] = torch.linalg.qr(columns).Q[:, :rank]
    path = folder / f"layers{rank}.safetensors"
    LayerSubspaces(bases=bases, provenance={"names": ["cat"]}).save(path)
    return path


def make_regions(folder: Path, limit: float, names: Sequence[str] = ("cat",)) -> Path:
    """Save the layers of `make_layers` with regions of a concept: where a score is above a limit.

    All places of noise are above -1, some above 1.7, none above 1e9.
    """
    held = LayerSubspaces.load(make_layers(folder))
    ends = "attn1.to_q"
    block = max(name for name in held.bases if name.endswith(ends)).partition(".attentions")[0]
    bases = {name: basis for name, basis in held.bases.items()
             if name.startswith(block) and name.endswith(ends)}  # fmt: skip
    regions = ConceptRegions(
        bases=bases, centres={name: torch.zeros(basis.shape[1]) for name, basis in bases.items()},
        units=dict.fromkeys(bases, 1.0), limit=limit, sigma=0.3,
    )  # fmt: skip
    path = folder / f"regions{limit}-{'-'.join(names)}.safetensors"
    replace(held, regions=regions, provenance={"names": list(names)}).save(path)
    return path


def make_concept(path: Path, network: nn.Module, names: Sequence[str] = ("cat",)) -> Path:
    """Save some adapter of a network as a concept that was learnt."""
    generator = torch.Generator().manual_seed(11)
    layers = adapted_layers(network)
    pairs = {
        name: (torch.randn(2, layer.in_features, generator=generator) / layer.in_features**0.5,
               torch.randn(layer.out_features, 2, generator=generator) / layer.out_features**0.5)
        for name, layer in layers.items()
    }  # fmt: skip
    samples = weight_samples(network, {name: (layers[name], 0) for name in layers}, pairs)
    numbers = {"concept": 1, "others": 0, "threshold": 0.5, "recall": 1, "false_positives": 0}
    model = {"sha256": "0" * 64, "pipeline": "", "network": type(network).__name__,
             "parametrization": ""}  # fmt: skip
    account = {"names": list(names), "model": model, "numbers": numbers, "made": {"from": "images"}}
    ConceptAdapter(pairs=pairs, samples=samples, account=account).save(path)
    return path


def layer_residuals(weights: dict[str, torch.Tensor], layers: Path) -> list[float]:
    """Return |A V_l| / |A| of down factors that read no text, by names and norms alone."""
    bases, found = load_file(layers), []
    for key, value in weights.items():
        name, factor, _ = key.removeprefix("unet.").partition(".lora_A")
        if factor and "attn2.to_k" not in name and "attn2.to_v" not in name:
            rows = value.double().movedim(1, -1)
            found.append(float((rows @ bases[name]).norm() / rows.norm()))
    assert found
    return found
