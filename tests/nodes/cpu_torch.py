"""Packages of PyPI that are built for CUDA's torch, imported beside a torch without CUDA."""

import sys
import types
from functools import cache
from importlib.util import find_spec

import torch


@cache
def tolerate_cpu_torch() -> list:
    """Let torchvision and torchaudio import although their compiled parts need CUDA's libraries.

    ComfyUI imports both and, for images, calls none of these parts; transformers imports
    torchvision where it finds it. Returns what must stay alive.
    """
    if torch.version.cuda is not None or sys.platform != "linux" or not find_spec("torchvision"):
        return []
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    extension = types.ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = extension._IS_ALIGN_AVAILABLE = False
    extension.fail_if_no_align = lambda function: function
    sys.modules[extension.__name__] = extension
    return [operators]
