"""What is checked around the loading of a model: its files, the memory, that nothing is random."""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files.weights import PICKLES, READER, ModelError, read_header, refuse_pickle
from ..wording import counted, name_some
from .quantization import is_quantized

GIB = 1024**3
IGNORED_KEYS = re.compile(r"(^|\.)position_ids$")
"""Buffers that older files hold and newer libraries compute."""
STEMS = ("diffusion_pytorch_model", "model")
"""How the names of weight files begin, of diffusers and of transformers."""
MARGIN = 1.1
"""Memory for activations and the like, relative to the weights."""
ROW_MEMORY = 8192
"""Bytes that a pass takes for each byte of a latent: see `trajectory.automatic_rows`."""


@dataclass(frozen=True, kw_only=True)
class WeightIndex:
    """Which file holds which weight."""

    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of one component, shards in order.

    Prefers the plain files; else takes the variant "fp16", else the first one that there is.
    """
    there = {_variant(path.name) for path in folder.glob("*.safetensors*")} - {None}
    for variant in sorted(map(str, there), key=lambda name: (name != "", name != "fp16", name)):
        end = f".{variant}" if variant else ""
        for stem in STEMS:
            for index in (f".safetensors.index{end}.json", f"{end}.safetensors.index.json"):
                if (path := folder / f"{stem}{index}").is_file():
                    return _shards(path)
            if (single := folder / f"{stem}{end}.safetensors").is_file():
                return [single]
    return []


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names, in order."""
    shards = READER.read(index, WeightIndex, foreign=True).weight_map.values()
    if not shards:
        raise ModelError(f"{index}: `weight_map` names no file, expected that of each weight.")
    return [index.parent / Path(name).name for name in sorted(set(shards))]


def variant_of(files: Iterable[Path]) -> str | None:
    """Return the variant that these files are, to be given to the libraries."""
    return next((_variant(file.name) for file in files), None) or None


def _variant(name: str) -> str | None:
    """Return what is left of a weight file's name, as in model.fp16-00001-of-00002.safetensors.

    Empty for plain weights, None for a file that holds no weights of its folder.
    """
    stem, *parts = re.sub(r"-\d+-of-\d+", "", name).split(".")
    if stem not in STEMS:
        return None
    return ".".join(part for part in parts if part not in ("safetensors", "index", "json"))


def require_weights(folder: Path) -> list[Path]:
    """Return the weight files of a component, or say why there are none that may be read."""
    if files := weight_files(folder):
        return files
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix.lower() in PICKLES)
    if pickles:
        refuse_pickle(folder / pickles[0])
    names = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else "no such folder"
    raise ModelError(
        f"{folder} has no weights: expected diffusion_pytorch_model.safetensors or "
        f"model.safetensors, found {names or 'nothing'}."
    )


def bytes_needed(files: Iterable[Path], dtype: torch.dtype) -> int:
    """Return the memory that the tensors of `files` take in `dtype`, in bytes."""
    sizes = (math.prod(shape) for file in files for _, shape in read_header(file).values())
    return sum(sizes) * torch.empty(0, dtype=dtype).element_size()


def available_memory(device: str) -> int | None:
    """Return the free memory of a device in bytes, None where it cannot be known."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    free = [_limit_of_container()]
    try:
        import psutil

        free.append(psutil.virtual_memory().available)
    except ImportError:
        if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
            free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((value for value in free if value is not None), default=None)


def _limit_of_container() -> int | None:
    """Return what a Linux container may still take: system-wide figures do not know its limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return None
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        used = int((root / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        return max(0, int(limit) - used)
    except (OSError, ValueError):
        return None


def check_memory(weights: int, dtype: torch.dtype, device: str) -> None:
    """Raise ModelError, saying how much, when weights of so many bytes cannot fit."""
    needed = int(weights * MARGIN)
    free = available_memory(device)
    if free is not None and needed > free:
        name = str(dtype).removeprefix("torch.")
        smaller = " in half precision (--dtype float16)," if dtype == torch.float32 else ""
        raise ModelError(
            f"The model needs about {needed / GIB:.1f} GiB in {name}, and {free / GIB:.1f} GiB "
            f"are free on {device}. Close other programs, run it{smaller} or on another device."
            + (" Or keep weights on the CPU: --offload model." if device != "cpu" else "")
        )


def check_frames(
    latent_shape: Sequence[int], dtype: torch.dtype, device: str, frames_per_latent: int
) -> None:
    """Raise ModelError, saying how many fit, when one clip has too many frames for the memory.

    Args:
        latent_shape: Channels, frames, height and width of one latent.
        dtype: Of the network.
        device: Where it runs.
        frames_per_latent: Frames of the clip that the autoencoder brings to one of the latent.
    """
    free = available_memory(device)
    channels, frames, *sides = latent_shape
    frame = channels * math.prod(sides) * dtype.itemsize * ROW_MEMORY
    if free is None or frames * frame <= free:
        return
    fitting = int(free / frame)
    remedy = f"about {(fitting - 1) * frames_per_latent + 1} fit" if fitting else "not one fits"
    raise ModelError(
        f"A clip of {(frames - 1) * frames_per_latent + 1} frames needs about "
        f"{frames * frame / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free on {device}: {remedy}. "
        "Give fewer frames or a smaller resolution."
    )


def check_keys(
    what: object, *, missing: Iterable[str], unused: Iterable[str], wrong: Iterable[str] = ()
) -> None:
    """Raise ModelError naming parameters the file leaves unset and keys nothing reads."""
    faults = {
        ("parameter it leaves unset", "parameters it leaves unset"): missing,
        ("key that nothing reads", "keys that nothing reads"): unused,
        ("weight of the wrong shape", "weights of the wrong shape"): wrong,
    }
    kept = {k: [n for n in v if not IGNORED_KEYS.search(n)] for k, v in faults.items()}
    if any(kept.values()):
        shown = "; ".join(f"{counted(len(v), *k)}: {name_some(v)}" for k, v in kept.items() if v)
        raise ModelError(
            f"{what} does not fit the network it is for ({shown}). Libraries would fill the gaps "
            "with random numbers; is the file of another version, cut, or only a part?"
        )


def check_values(module: torch.nn.Module, files: Iterable[Path], what: object) -> None:
    """Raise ModelError when the first row of a weight differs from the file.

    The libraries' own reports do not suffice: key names changed between transformers 4 and 5
    (``text_model.``), and a reader that does not know one of them starts from random weights.
    """
    from safetensors import safe_open

    state = {plain(name): tensor for name, tensor in module.state_dict().items()}
    wrong = []
    for file in files:
        with safe_open(file, "pt") as reader:
            for key in reader.keys():
                own = state.get(plain(key))
                view = reader.get_slice(key)
                if own is None or tuple(view.get_shape()) != tuple(own.shape) or not own.ndim:
                    continue  # converted on the way; the libraries' report covers it
                if is_quantized(own):
                    continue  # rounded on purpose
                row = view[:1].to(own.dtype)
                if not torch.equal(row.nan_to_num(), own[:1].cpu().nan_to_num()):
                    wrong.append(key)
    if wrong:
        raise ModelError(
            f"{what}: after loading, {counted(len(wrong), 'weight differs', 'weights differ')} "
            f"from the file: {name_some(wrong)}. This version of the libraries does not know the "
            "file's key names."
        )


def fill(module: torch.nn.Module, files: Iterable[Path]) -> set[str]:
    """Copy weights whose names differ by a prefix alone; return the keys that found no place."""
    from safetensors.torch import load_file

    state = {plain(name): tensor for name, tensor in module.state_dict().items()}
    lost = set()
    for file in files:
        for key, value in load_file(file).items():
            if plain(key) in state:
                state[plain(key)].copy_(value)
            else:
                lost.add(key)
    return lost


def plain(key: str) -> str:
    """Return a key without the prefix that transformers 4 writes and transformers 5 does not."""
    return key.removeprefix("text_model.")
