"""Parts of a network that an optimisation leaves alone, computed once.

A search over embeddings calls the network again and again with the same noise and noise level. All
that comes before the text enters is the same each time: the time embedding, the first convolutions,
the first self-attention. Autograd knows which parts these are.
"""

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..patching import Function, patched


class Constants:
    """Outputs of a network's modules that do not depend on what is searched for.

    Only for calls in which nothing requires a gradient but what is searched for, weights included.
    """

    def __init__(self, network: nn.Module | None):
        self.network = network
        """None computes everything each time."""
        self._key: Hashable = None
        self._outputs: dict[nn.Module, Any] = {}

    @contextmanager
    def of(self, key: Hashable) -> Iterator[None]:
        """Let the network use what it computed before under the same key.

        Args:
            key: Equal for calls that differ in nothing but what is searched for.
        """
        if self.network is None:
            yield
        elif key == self._key:
            with _replaying(self._outputs):
                yield
        elif torch.is_grad_enabled():
            self._key, self._outputs = None, {}
            with _recording(self.network) as constant:
                yield
            self._key, self._outputs = key, constant
        else:  # without a graph everything would look constant
            yield


@contextmanager
def _recording(network: nn.Module) -> Iterator[dict[nn.Module, Any]]:
    """Collect the outputs, without gradient, of the outermost modules that are called once.

    The dictionary is filled when the block ends.
    """
    calls: Counter[nn.Module] = Counter()
    outputs: dict[nn.Module, tuple[Any, list[int]]] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        calls[module] += 1
        tensors = _tensors(output)
        if tensors and not any(tensor.requires_grad for tensor in tensors):
            outputs[module] = output, [tensor._version for tensor in tensors]

    constant: dict[nn.Module, Any] = {}
    with ExitStack() as undo:
        for module in network.modules():
            undo.callback(module.register_forward_hook(record).remove)
        yield constant
    inside: set[nn.Module] = set()
    for module in network.modules():  # outer modules first
        if module in inside or module not in outputs or calls[module] > 1:
            continue
        output, versions = outputs[module]
        # An output that is written into later would be another one the next time.
        if [tensor._version for tensor in _tensors(output)] == versions:
            constant[module] = output
            inside |= set(module.modules())


@contextmanager
def _replaying(outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """Let the modules return what they returned before."""
    with ExitStack() as undo:
        for module, output in outputs.items():
            undo.enter_context(patched(module, "forward", partial(_always, output)))
        yield


def _always(output: Any, original: Function) -> Function:
    """Return a function that returns `output` whatever it is given."""
    return lambda *args, **kwargs: output


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a module's output, none where it holds anything else."""
    parts = output if isinstance(output, tuple | list) else (output,)
    return list(parts) if all(isinstance(part, Tensor) for part in parts) else []
