"""The weights that a full fine-tuning changes, as they were before it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..models.lora.attach import adapter_parameters


class BaseWeights:
    """Copies of what is trained and is no adapter: adapters are switched off, weights exchanged.

    One copy of the trained weights stays on their device. Without any, nothing is kept.
    """

    def __init__(self, networks: Iterable[nn.Module], trained: Iterable[Tensor]):
        """Copy the weights as they are now.

        Args:
            networks: Whose weights are kept.
            trained: What optimizers train, of these networks or others.
        """
        moved, self._kept = {id(each) for each in trained}, []
        for network in networks:
            own = moved - {id(each) for each in adapter_parameters(network)}
            weights = (each for each in network.parameters() if id(each) in own)
            self._kept += [(each, each.detach().clone()) for each in weights]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the networks compute with the copies for a block without gradient.

        Only which memory a weight reads is exchanged: no value moves, and a pass that waits for its
        gradient goes on to see its own.
        """
        trained = [weight.data for weight, _ in self._kept]
        try:
            for weight, before in self._kept:
                weight.data = before
            yield
        finally:
            for (weight, _), now in zip(self._kept, trained, strict=True):
                weight.data = now
