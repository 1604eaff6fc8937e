"""Runs of training scripts of diffusers, with the launcher and without, in this process."""

import json
import runpy
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors import safe_open
from safetensors.torch import load_file
from unmemorize import demo
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.layers.fitting import layers_without_text
from unmemorize.shared.training.layers.regions import ConceptRegions
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.trainer_patch.diffusers.__main__ import main

SCRIPT = Path(__file__).parent / "diffusers_script.py"
LORA = "pytorch_lora_weights.safetensors"
WIDTH = json.loads((demo.MODEL / "unet" / "config.json").read_text("utf-8"))["cross_attention_dim"]
"""Of the demo model's text states."""
THINGS = ("tree", "cat", "house", "boat", "dog", "star")


def make_images(folder: Path) -> Path:
    """Make a training folder of six small pictures with a caption each."""
    from PIL import Image

    folder.mkdir()
    captions = {
        f"image{place}.png": f"a drawing of a {thing}" for place, thing in enumerate(THINGS)
    }
    for place, name in enumerate(captions):
        Image.new("RGB", (32, 32), (40 * place, 10, 200 - 30 * place)).save(folder / name)
    (folder / "captions.json").write_text(json.dumps(captions), "utf-8")
    return folder


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


def run(
    output: Path,
    arguments: Sequence[str],
    *,
    script: Path = SCRIPT,
    model: Path = demo.MODEL,
    protected: bool = True,
) -> Path:
    """Run a script on a model, as the launcher does or as Python does; return `output`."""
    given = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(output)]
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    before = sys.argv, list(sys.path)
    sys.argv = ["launcher", str(script), *given, *arguments]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scripts and their libraries may warn as they like
            if protected:
                main()
            else:
                sys.argv.pop(0)
                runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
    return output


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a saved LoRA."""
    return load_file(output / LORA)


def header_of(output: Path) -> dict[str, str]:
    """Return the metadata of a saved LoRA."""
    with safe_open(output / LORA, "pt") as file:
        return file.metadata() or {}


def records_of(output: Path, process: int = 0) -> list[dict]:
    """Return the decisions that one process wrote; of those done again, the last."""
    end = f".{process}.jsonl" if process else ".jsonl"
    path = output / f"{Path(LORA).stem}.memorized{end}"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return list({line["key"]: line["value"] for line in lines}.values())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether two LoRAs are the same bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


def residual(weights: dict[str, torch.Tensor], basis: torch.Tensor) -> float:
    """Return the largest |A V| / |A| of down factors that read text: by names and norms alone."""
    found = [
        float((value.double() @ basis).norm() / value.double().norm())
        for key, value in weights.items()
        if any(part in key for part in ("attn2.to_k", "attn2.to_v", "context_embedder"))
        and any(part in key for part in ("lora_A", "lora.down"))
    ]
    assert found
    return max(found)


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
