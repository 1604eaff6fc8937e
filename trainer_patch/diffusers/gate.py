"""The memorization filter on a network of diffusers: hooks around its own forward pass.

Whatever loss a script computes from the prediction, no gradient reaches it from samples that are
left out. The prediction keeps its value, so the loss that is shown keeps its meaning.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...shared.arrays import take_rows
from ...shared.training.filter.filter import scale_gradient
from ...shared.training.filter.sample_log import Sample
from ...shared.training.projection.factors import UnsupportedTraining
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from .text import TEXT, EmptyPrompt

Samples = Callable[[], Sequence[Sample]]
"""Who is in the batch of the forward pass that runs now; empty when that is not known."""


class _Asked(NamedTuple):
    """What is known of a step before its own prediction."""

    state: RandomState
    timesteps: Tensor
    samples: Sequence[Sample]
    plain: Tensor | None
    """On the empty prompt, of the samples that are due; None where none is."""


class Gate:
    """Runs the network once more on the empty prompt and gates the gradient of its prediction."""

    def __init__(
        self,
        network: nn.Module,
        protection: Protection,
        empty: EmptyPrompt,
        samples: Samples,
        *,
        prior_preservation: bool = False,
    ):
        """Set up; `attached` puts the hooks on.

        Args:
            network: Of diffusers, that is trained.
            protection: With a filter.
            empty: In place of the prompts.
            samples: Asked in each step.
            prior_preservation: The second half of each batch are class images that the model
                made itself; they are neither looked at nor left out.
        """
        self.network, self.protection, self.empty = network, protection, empty
        self.samples, self.prior_preservation = samples, prior_preservation
        self._signature = inspect.signature(type(network).forward)
        self._asked: _Asked | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Gate every forward pass with gradient, for as long as the block lasts."""
        before = self.network.register_forward_pre_hook(self._ask, with_kwargs=True)
        after = self.network.register_forward_hook(self._gate)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _ask(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        """Predict on the empty prompt: before the training's own pass, to share no memory with it.

        Activations that wait for the backward pass would be held beside those made here.
        """
        self._asked = None
        if not torch.is_grad_enabled():
            return  # sampling for validation
        call, state = self._call(args, kwargs), RandomState.now(network.device)
        count = len(next(iter(call.values())))
        rows = count // (2 if self.prior_preservation else 1)
        timesteps, samples = self.empty.timesteps(call, rows), self._samples(call[TEXT], rows)
        due, plain = self.protection.due(samples, timesteps), None
        if due.any():
            some = call if due.all() else take_rows(call, due.nonzero().flatten(), count)
            # Not `network(...)`, which would come back to the hook.
            with aside(state):
                plain = network.forward(**self.empty.in_place_of_prompt(some))[0]
            plain = plain[: int(due.sum())]
        self._asked = _Asked(state, timesteps, samples, plain)

    def _gate(self, network: nn.Module, args: tuple, output: Any) -> Any:
        """Return the output with its gradient gated; None leaves it as it is."""
        asked, self._asked = self._asked, None
        prediction = output[0]
        if asked is None or not prediction.requires_grad:
            return None
        rows = len(asked.samples)
        weights = self.protection.weigh(
            prediction[:rows],
            prediction[:0].detach() if asked.plain is None else asked.plain,
            timesteps=asked.timesteps,
            samples=asked.samples,
            scale=self.empty.scale(asked.timesteps),
            before=asked.state,
        )
        gated = scale_gradient(
            prediction, torch.cat([weights, weights.new_ones(len(prediction) - rows)])
        )
        if gated is prediction:
            return None
        return (gated, *output[1:]) if isinstance(output, tuple) else type(output)(gated)

    def _call(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """Return the arguments of the forward pass by name."""
        bound = self._signature.bind(self.network, *args, **kwargs).arguments
        bound.pop("self")
        return {**bound, **bound.pop("kwargs", {})}

    def _samples(self, text: Tensor, rows: int) -> Sequence[Sample]:
        """Return who is in the batch, by the text alone where nothing else is known."""
        known = self.samples()
        if known and len(known) != rows:
            raise UnsupportedTraining(
                f"The network is called with {rows} samples, the batch holds {len(known)}."
            )
        # One row of text may stand for all.
        return known or [Sample(file=f"text {_hash(text[row % len(text)])}") for row in range(rows)]


def _hash(text: Tensor) -> str:
    """Return twelve digits that tell one encoded caption from another."""
    content = text.detach().float().cpu().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:12]
