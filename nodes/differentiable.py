"""Gradients through a network of ComfyUI, which runs nodes in inference mode."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import comfy.model_management
import torch
from torch import Tensor


@contextmanager
def differentiable(network: torch.nn.Module) -> Iterator[None]:
    """Make a loaded network one that autograd can run through, and undo it all at the end.

    Inside, inference mode is off and gradients are on. Weights that are inference tensors, which
    autograd refuses to save, are replaced by normal tensors over the same memory. ComfyUI's
    kernels without a backward are off, where the version has such. Networks that write into their
    activations in place (Flux) are differentiated as if they did not.

    Args:
        network: With its weights where they will be used; nothing may load or move it inside.
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
                        tensors[name] = _normal_view(tensor)
        # Around forward and backward: checkpointing or hooks alone give silently wrong gradients.
        undo.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
        yield


def normal(value: object) -> object:
    """Return a copy of an inference tensor that autograd may save, and anything else as it is."""
    if isinstance(value, list):
        return [normal(part) for part in value]
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _normal_view(tensor: Tensor) -> Tensor:
    """Return a normal tensor over the memory of an inference tensor, a parameter if that was one.

    Detaching or wrapping would give an inference tensor again.
    """
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(view, requires_grad=False)
    return view
