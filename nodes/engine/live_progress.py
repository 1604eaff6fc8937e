"""What the user sees while a node works: the progress bar and, with previews on, a picture."""

from collections.abc import Callable

import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

OnPrediction = Callable[[Tensor, Tensor], None]
"""Called with x and the x0-prediction, each [row *latent], after a forward pass."""


def live_progress(model: ModelPatcher, rows: int) -> OnPrediction:
    """Return what shows the first x0-prediction of each forward pass, as KSampler would.

    ComfyUI's own previewer draws, in the way that the user has chosen for previews; where they are
    off, only the progress bar moves.

    Args:
        model: MODEL whose latents are drawn.
        rows: Of all forward passes together: where the bar ends.
    """
    show, done = latent_preview.prepare_callback(model, rows), 0

    @torch.no_grad()  # a previewer's own weights are inference tensors, which autograd refuses
    def on_prediction(x: Tensor, x0: Tensor) -> None:
        nonlocal done
        done += len(x0)
        show(done - 1, x0.detach(), x, rows)

    return on_prediction
