"""The demo model on the other side: through diffusers, in the test's own process."""

from functools import cache

import torch
from unmemorize import demo
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.load import load_denoiser


@cache
def denoiser() -> PipelineDenoiser:
    """Return the demo through diffusers, in float32 on the CPU as ComfyUI runs it here."""
    return load_denoiser(demo.MODEL, device="cpu", dtype=torch.float32)


def caption(group: str = "verbatim") -> str:
    """Return the first caption of a group of the demo."""
    return next(c.text for c in demo.captions() if c.group == group)
