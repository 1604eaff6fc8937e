"""The text path of sd-scripts: from prompts to what its network reads."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...shared.models.tokens import read
from ...shared.training.concept.text_states import TextStates
from .training import Training

Conds = Any
"""What the trainer hands to its network: a tensor, or a sequence of tensors and None."""


class TextSide:
    """Encodes prompts as a training does, before the training changes or deletes the encoders."""

    def __init__(self, training: Training):
        self._training = training
        # Before v0.10 the dataset tokenizes and the trainer encodes; since then strategies do both.
        self._strategies = sys.modules.get("library.strategy_base")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor | None]:
        """Return the conditioning of prompts, one tensor [prompt ...] for each part of it."""
        with self._training.accelerator.autocast():
            conds = self._by_strategy(prompts) if self._strategies else self._by_trainer(prompts)
        return [conds] if isinstance(conds, Tensor) else list(conds)

    def states(self, prompts: Sequence[str]) -> TextStates:
        """Return what cross-attention reads; a `TextPath`. For SD 1, SD 2 and SDXL."""
        parts = [cond for cond in self.encode(prompts) if cond is not None and cond.ndim == 3]
        states = torch.cat([part.float() for part in parts], dim=-1)
        words = (read(self._tokenizers()[0], prompt, states.shape[1]) for prompt in prompts)
        return TextStates(
            states=states,
            words=tuple(tuple(token.word for token in reading.tokens) for reading in words),
            encoders=tuple(part.shape[-1] for part in parts) if len(parts) > 1 else (),
        )

    def _by_strategy(self, prompts: Sequence[str]) -> Conds:
        tokenize = self._strategies.TokenizeStrategy.get_strategy()
        encode = self._strategies.TextEncodingStrategy.get_strategy()
        known = inspect.signature(encode.encode_tokens).parameters
        settings = {"enable_dropout": False} if "enable_dropout" in known else {}  # SD3
        if getattr(self._training.args, "cache_text_encoder_outputs", False):
            masks = {name for name in known if name.startswith("apply_")}
            settings |= {name: getattr(self._training.args, name) for name in masks}
        tokens = tokenize.tokenize(list(prompts))
        return encode.encode_tokens(tokenize, self._training.text_encoders, tokens, **settings)

    def _by_trainer(self, prompts: Sequence[str]) -> Conds:
        training = self._training
        dataset, tokenizers = training.dataset.datasets[0], self._tokenizers()
        ids = [
            torch.stack([dataset.get_input_ids(prompt, tokenizer) for prompt in prompts])
            for tokenizer in tokenizers
        ]
        batch = dict(zip(("input_ids", "input_ids2"), ids, strict=False))
        with _on(training.accelerator.device, training.text_encoders):
            return training.trainer.get_text_cond(
                training.args, training.accelerator, batch, tokenizers, training.text_encoders,
                training.weight_dtype,
            )  # fmt: skip

    def _tokenizers(self) -> list[Any]:
        if not self._strategies:
            return self._training.dataset.datasets[0].tokenizers
        tokenize = self._strategies.TokenizeStrategy.get_strategy()
        return self._training.trainer.get_tokenizers(tokenize)


def without_text(conds: Conds, empty: Sequence[Tensor | None]) -> Conds:
    """Return a conditioning of the same form that says nothing.

    Raises:
        ValueError: The empty prompt's has another shape.
    """
    parts = [conds] if isinstance(conds, Tensor) else list(conds)
    replaced = []
    for part, plain in zip(parts, empty, strict=True):
        if part is None or plain is None:
            replaced.append(part)
            continue
        if part.shape[1:] != plain.shape[1:]:
            raise ValueError(
                f"Text states of this batch are {tuple(part.shape[1:])}, those of the empty prompt "
                f"{tuple(plain.shape[1:])}: sd-scripts padded them differently, and the "
                "memorization filter cannot compare."
            )
        replaced.append(plain.to(part.device, part.dtype).expand_as(part).clone())
    return replaced[0] if isinstance(conds, Tensor) else type(conds)(replaced)


@contextmanager
def _on(device: torch.device, models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Hold models on a device: with cached text the trainer has put them away."""
    with ExitStack() as undo:
        for model in models:
            undo.callback(model.to, next(model.parameters()).device)
            model.to(device)
        yield
