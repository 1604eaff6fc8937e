"""Models larger than the GPU: diffusers brings their parts to it while they compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..dependencies import require
from ..files.weights import ModelError

OFFLOADS = ("model", "sequential", "group")
"""One part at a time; one layer at a time; one layer at a time, the next copied meanwhile."""

HOOKS = {"_hf_hook", "_diffusers_hook"}
"""What accelerate and diffusers leave on modules whose weights they move."""


def enable_offload(pipeline: Any, offload: str, device: str) -> None:
    """Keep the weights of a loaded pipeline on the CPU, and bring them to `device` as needed.

    Args:
        pipeline: On the CPU, with its LoRA.
        offload: One of `OFFLOADS`.
        device: Where it computes; no CPU.

    Raises:
        ModelError: The installed diffusers cannot do it with this pipeline.
    """
    require("accelerate", purpose=f"--offload {offload}", extra="models")
    try:
        if offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        else:
            # The autoencoder is small, and changes its dtype, which the copies would not notice.
            pipeline.enable_group_offload(
                torch.device(device), offload_type="leaf_level",
                use_stream=torch.device(device).type == "cuda", exclude_modules=["vae"],
            )  # fmt: skip
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ModelError(
            f"--offload {offload} does not work with {type(pipeline).__name__} in this diffusers: "
            f"{error}. Type: pip install --upgrade diffusers accelerate, or choose another way: "
            f"{', '.join(OFFLOADS)}."
        ) from error


def is_offloaded(pipeline: Any) -> bool:
    """Return whether weights of a pipeline are moved while it computes, whoever set that up."""
    parts = (part for part in pipeline.components.values() if isinstance(part, nn.Module))
    # Asked before every pass: `hasattr` takes a module as long as a small layer takes to run.
    return any(not HOOKS.isdisjoint(vars(module)) for part in parts for module in part.modules())


@contextmanager
def moving_weights(pipeline: Any) -> Iterator[None]:
    """Let a pipeline compute whose weights may be moved meanwhile.

    Weights that are moved in inference mode could never be differentiated through again. And a
    graph has to keep the copy of a weight that it was made with: the weight itself lies elsewhere
    when the gradient comes back.
    """
    if not is_offloaded(pipeline):
        yield
        return
    with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
            yield


def put_away(pipeline: Any) -> None:
    """Bring the parts back to the CPU that `--offload model` left where they were used last.

    Diffusers does so for the order within its own call: text, network, image. Prompts that are
    encoded between two passes of the network would stand beside it.
    """
    for hook in getattr(pipeline, "_all_hooks", ()):
        hook.offload()


def weights_of(part: nn.Module) -> dict[str, Tensor]:
    """Return the state of a part, also where it rests outside of its parameters."""
    state = part.state_dict()
    if not any(tensor.is_meta for tensor in state.values()):
        return state
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return get_state_dict_offloaded_model(part)
