"""Weights of few bits, made while a model is loaded, by the backends that diffusers knows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dependencies import has, require

LARGE = 10**9
"""Parameters from which a text encoder is quantized too: T5 and language models, not CLIP."""


@dataclass(frozen=True, kw_only=True)
class _Backend:
    package: str
    """By the name that pip and Python know it by."""
    bits: int
    """That one weight takes."""
    needs_gpu: bool


QUANTIZATIONS = {
    "nf4": _Backend(package="bitsandbytes", bits=4, needs_gpu=True),
    "int8": _Backend(package="torchao", bits=8, needs_gpu=False),
    "float8": _Backend(package="torchao", bits=8, needs_gpu=False),
}
"""By the name of the number format, which is what decides the scores."""


def check_quantization(
    quantize: str | None, *, device: str, offload: str | None, lora: bool
) -> None:
    """Make sure that a model can be quantized here, before anything is loaded.

    Raises:
        ValueError: There is no such format, or it does not go with the device, the offloading or a
            LoRA.
        ImportError: Its package is missing; says what to type.
    """
    if quantize is None:
        return
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"`quantize` must be one of {', '.join(QUANTIZATIONS)}, got {quantize!r}.")
    backend = QUANTIZATIONS[quantize]
    if backend.needs_gpu and torch.device(device).type == "cpu":
        raise ValueError(
            f"--quantize {quantize} needs a GPU, and the device is {device}. Leave it out, or take "
            "--quantize int8."
        )
    if lora and backend.bits < 8:  # the shape of packed weights is not that of the factors
        raise ValueError(
            f"--quantize {quantize} does not go with --lora. Take --quantize int8 or float8."
        )
    if offload not in (None, "model"):
        raise ValueError(
            f"--quantize does not go with --offload {offload}, which moves single layers. Take "
            "--offload model."
        )
    if not has(backend.package):
        raise ImportError(
            f"--quantize {quantize} needs the package `{backend.package}`, which is not installed. "
            f"Type: pip install {backend.package}"
        )


class RoundedWeights(Mapping[str, Tensor]):
    """State of a part; tensors of a quantization are widened one by one, when they are read."""

    def __init__(self, part: nn.Module):
        self._state = part.state_dict()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        return tensor.dequantize() if is_quantized(tensor) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def is_quantized(tensor: Tensor) -> bool:
    """Return whether a tensor is of a quantization's own class, which is no plain numbers."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "dequantize")


def quantization_config(quantize: str, library: str, dtype: torch.dtype) -> Any:
    """Return the configuration that a loader of diffusers or transformers takes.

    Args:
        quantize: One of `QUANTIZATIONS`.
        library: "diffusers" or "transformers".
        dtype: What the network computes in.
    """
    module = require(library, purpose="Running a diffusion model", extra="models")
    if quantize == "nf4":
        return module.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    import torchao.quantization as formats

    kinds = {"int8": formats.Int8WeightOnlyConfig, "float8": formats.Float8WeightOnlyConfig}
    return module.TorchAoConfig(kinds[quantize]())
