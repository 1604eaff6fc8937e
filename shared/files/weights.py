"""Weight files read as data: never unpickled, whole or refused, nothing random in them."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..wording import counted, name_some
from .schema import Reader

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
QUANTIZED = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale(_2|_inv)?|input_scale|comfy_quant"
    r"|(weight\.)?(absmax|quant_map|quant_state\..*|nested_.*)|SCB|qweight|qzeros|wscales)$"
)
"""Keys that quantized weights bring along, of ComfyUI, bitsandbytes, GPTQ and Nunchaku."""
NUMBERS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Types of safetensors that hold one real number a value; the others are read as bookkeeping."""
COUNTS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


class ModelError(ValueError):
    """A model or LoRA that cannot be used as it is; the message says what to do."""


READER = Reader(ModelError, "JSON of a model or a LoRA", "Copy the file again.")
"""Of the JSON that models and LoRAs bring along."""


def refuse_pickle(path: Path) -> None:
    """Raise ModelError where there is no file, or one that could run code when it is read."""
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        meant = f"Did you mean {inside[0]}?" if inside else "Give a .safetensors file."
        raise ModelError(f"{path} is a folder, expected one file. {meant}")
    if not path.is_file():
        raise ModelError(f"There is no such file: {path}")
    with path.open("rb") as file:
        start = file.read(9)
    # Old and new torch.save; the length that opens a safetensors file can begin with 80, too.
    pickled = (start[:1] == b"\x80" and start[8:] != b"{") or start[:4] == b"PK\x03\x04"
    if path.suffix.lower() in PICKLES or pickled:
        renamed = " renamed to .safetensors" if path.suffix.lower() == ".safetensors" else ""
        raise ModelError(
            f"{path} is a pickle{renamed}: reading it can run any program hidden in it, so it is "
            "refused. Type: torch.load(path, weights_only=True) where you trust the file, and "
            "write its state dict with safetensors.torch.save_file."
        )


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of a safetensors file, without loading any.

    Raises:
        ModelError: When the file is missing, a pickle, cut off, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    refuse_pickle(path)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError as error:
        size = path.stat().st_size
        raise ModelError(
            f"{path} is not a whole safetensors file ({size:,} bytes): {error}. It is cut off or "
            "of another kind; download or copy it again and compare its sha256."
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return what the header of a safetensors file says besides names, dtypes and shapes."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, on the CPU.

    Raises:
        ModelError: It is missing, a pickle, cut off, not safetensors, or holds NaN or infinity.
    """
    from safetensors.torch import load_file

    refuse_quantized(path, read_header(path))
    tensors = load_file(path)
    # Few operations know 8-bit numbers; float32 holds each of them exactly.
    tensors = {name: _wide(tensor) for name, tensor in tensors.items()}
    check_finite(tensors, str(path))
    return tensors


def refuse_quantized(path: Path, header: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise ModelError for weights that are codes, which mean nothing without their scales."""
    codes = [
        name for name, (dtype, shape) in header.items()
        if QUANTIZED.search(name)
        or dtype not in (*NUMBERS, *COUNTS)
        or (dtype in COUNTS and len(shape) > 1 and not name.endswith("position_ids"))
    ]  # fmt: skip
    if codes:
        dtypes = {header[name][0] for name in codes}
        raise ModelError(
            f"{path} is quantized ({counted(len(codes), 'key', 'keys')} such as "
            f"{name_some(codes, 2)}, of {', '.join(sorted(dtypes))}), which is not read. Give the "
            "same weights in fp32, bf16, fp16, or plain fp8."
        )


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise ModelError naming the tensors that hold NaN or infinity."""
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(_wide(tensor)).all()
    ]
    if bad:
        dtypes = {str(tensors[name].dtype).removeprefix("torch.") for name in bad}
        raise ModelError(
            f"{what} has {counted(len(bad), 'weight', 'weights')} with NaN or infinity (in "
            f"{', '.join(sorted(dtypes))}): {name_some(bad)}. The training has diverged, the file "
            "is damaged, or the values do not fit this precision; try --dtype float32."
        )


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor that torch can compute with: 8-bit numbers as float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def sha256_of(files: Iterable[Path], root: Path) -> str:
    """Return one sha256 over the names below `root` and the contents of files."""
    total = hashlib.sha256()
    for file in sorted(files):
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
        total.update(f"{name}\0{file_sha256(file)}\n".encode())
    return total.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            total.update(chunk)
    return total.hexdigest()
