"""Gradients through a network of ComfyUI, which runs nodes in inference mode."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ...shared.arrays import normal_view


@contextmanager
def differentiable(network: torch.nn.Module, *, in_place: bool) -> Iterator[None]:
    """Make a loaded network one that autograd can run through, and undo it all at the end.

    Inside, inference mode is off and gradients are on. Weights that are inference tensors, which
    autograd refuses to save, are replaced by normal tensors over the same memory. ComfyUI's
    kernels without a backward are off, where the version has such.

    Args:
        network: With its weights where they will be used; nothing may load or move it inside.
        in_place: Differentiate a network that writes into its activations as if it did not, which
            doubles the time; without it autograd raises where that would change a gradient.
    """
    with ExitStack() as undo:
        if hasattr(comfy.model_management, "in_training"):  # newer than 0.3
            before = comfy.model_management.in_training
            undo.callback(setattr, comfy.model_management, "in_training", before)
            comfy.model_management.in_training = True
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference():
                        undo.callback(tensors.__setitem__, name, tensor)
                        tensors[name] = normal_view(tensor)
        if in_place:
            # Around forward and backward: checkpointing or hooks alone give silently wrong
            # gradients.
            undo.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
        yield


def writes_in_place(guider: Any, model_options: dict) -> bool:
    """Return whether a run may write into activations that autograd has saved.

    ComfyUI's U-Net does not; Flux and its like, ControlNets and patches of other packs may.

    Args:
        guider: Inside its call of the sampler.
        model_options: Of the run.
    """
    options = model_options.get("transformer_options", {})
    patched = any(options.get(key) for key in ("patches", "patches_replace"))
    controlled = any("control" in cond for conds in guider.conds.values() for cond in conds)
    return patched or controlled or not isinstance(guider.inner_model.diffusion_model, UNetModel)


def normal(value: object) -> object:
    """Return a copy of an inference tensor that autograd may save, and anything else as it is."""
    if isinstance(value, list):
        return [normal(part) for part in value]
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
