"""A prompt encoded with the graph from the input token embeddings of its text encoders."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def input_leaves(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that gets the token embeddings of each call of an encoder in the block.

    Each is a leaf of at least float32, [prompt token width]; the encoder reads it in its own dtype,
    so what it returns is the same and can be differentiated in the leaf. Needs gradients on.

    Args:
        encoder: Text encoder of transformers.
    """
    seen: list[Tensor] = []

    def replaced(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        wide = output.detach().to(torch.promote_types(output.dtype, torch.float32))
        seen.append(wide.clone().requires_grad_())
        return seen[-1].to(output.dtype)

    # T5 keeps its table under two names, in some versions as two modules with one weight.
    table: Any = encoder.get_input_embeddings()
    modules = [m for m in encoder.modules() if getattr(m, "weight", None) is table.weight]
    hooks = [m.register_forward_hook(replaced) for m in modules if isinstance(m, nn.Embedding)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def encoders_of(pipeline: Any) -> list[tuple[nn.Module, Any]]:
    """Return a diffusers pipeline's text encoders, each with its tokenizer."""
    ends = ("", "_2", "_3", "_4")
    pairs = [
        (getattr(pipeline, f"text_encoder{end}", None), getattr(pipeline, f"tokenizer{end}", None))
        for end in ends
    ]
    return [(encoder, tokenizer) for encoder, tokenizer in pairs if encoder is not None]
