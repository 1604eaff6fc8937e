"""Runs of training scripts of diffusers, with the launcher and without, in this process."""

import json
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors import safe_open
from safetensors.torch import load_file
from unmemorize import demo
from unmemorize.trainer_patch.diffusers.__main__ import main

SCRIPT = Path(__file__).parent / "diffusers_script.py"
LORA = "pytorch_lora_weights.safetensors"
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


@contextmanager
def anew() -> Iterator[None]:
    """Let a training run as the first in its process, with whatever it warns of."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripts and their libraries may warn as they like
        yield


def run(
    output: Path,
    arguments: Sequence[str],
    *,
    script: Path = SCRIPT,
    model: Path = demo.MODEL,
    protected: bool = True,
) -> Path:
    """Run a script on a model, as the launcher does or as Python does; return `output`.

    Raises:
        Exception: What the launcher ended the program for.
    """
    given = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(output)]
    before = sys.argv, list(sys.path)
    sys.argv = ["launcher", str(script), *given, *arguments]
    try:
        with anew():
            if protected:
                main()
            else:
                sys.argv.pop(0)
                runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        raise end.__cause__ or end  # noqa: B904
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
