"""What sd-scripts makes of prompts, and which image stands behind each row of a batch."""

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ...shared.patching import Function, patched
from ...shared.training.concept.text_states import TextStates, read_states
from ...shared.training.filter.sample_log import Sample
from ..step import repeated
from .training import Training

DISCARDING = ("HunyuanImageNetworkTrainer",)
"""Trainers that throw their text encoders away once they have cached text, and whose text is padded
to the longest caption of a batch."""
Conds = Any
"""What the trainer hands to its network: a tensor, or a sequence of tensors and None."""


class TextSide:
    """Encodes prompts as a training does, before the training changes or deletes the encoders."""

    def __init__(self, training: Training, kept: Sequence[Tensor | None] = ()):
        """Take a training, and its encoded empty prompt where the encoders are gone."""
        self._training, self._kept = training, list(kept)
        # Before v0.10 the dataset tokenizes and the trainer encodes; since then strategies do both.
        self._strategies = sys.modules.get("library.strategy_base")

    def encode(self, prompts: Sequence[str]) -> list[Tensor | None]:
        """Return the conditioning of prompts, one tensor [prompt ...] for each part of it."""
        if self._kept and list(prompts) == [""]:
            return self._kept
        return self._encoded(prompts, self._training.text_encoders)

    def encode_again(self, prompts: Sequence[str]) -> list[Tensor | None]:
        """Return the same while text encoders are trained; None for parts of others put away."""
        training, models = self._training, self._training.text_encoders
        if self._strategies and not training.has_unet:
            models = training.trainer.get_models_for_text_encoding(
                training.args, training.accelerator, models
            )
        return self._encoded(prompts, models)

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[str], models: Any) -> list[Tensor | None]:
        with self._training.accelerator.autocast():
            conds = (
                self._by_strategy(prompts, models)
                if self._strategies
                else self._by_trainer(prompts)
            )
        return [conds] if isinstance(conds, Tensor) else list(conds)

    def states(self, prompts: Sequence[str]) -> TextStates:
        """Return what cross-attention reads; a `TextPath`. For SD 1, SD 2 and SDXL."""
        parts = [cond for cond in self.encode(prompts) if cond is not None and cond.ndim == 3]
        return read_states([part.float() for part in parts], self._tokenizers()[0], prompts)

    def _by_strategy(self, prompts: Sequence[str], models: Any) -> Conds:
        tokenize = self._strategies.TokenizeStrategy.get_strategy()
        encode = self._strategies.TextEncodingStrategy.get_strategy()
        known = inspect.signature(encode.encode_tokens).parameters
        settings = {"enable_dropout": False} if "enable_dropout" in known else {}  # SD3
        if getattr(self._training.args, "cache_text_encoder_outputs", False):
            masks = {name for name in known if name.startswith("apply_")}
            settings |= {name: getattr(self._training.args, name) for name in masks}
        tokens = tokenize.tokenize(list(prompts))
        return encode.encode_tokens(tokenize, models, tokens, **settings)

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


def discards_text(trainer: type, args: argparse.Namespace) -> bool:
    """Return whether the text encoders are gone when a trainer makes its network."""
    return trainer.__name__ in DISCARDING and args.cache_text_encoder_outputs


def keeping_empty(empty: list[Tensor | None]) -> Callable[[Function], Function]:
    """Return what makes a trainer encode the empty prompt too, while it caches captions.

    Args:
        empty: Is filled with it.
    """

    def wrap(cache: Function) -> Function:
        signature = inspect.signature(cache)

        def cache_text(*args: Any, **kwargs: Any) -> None:
            dataset = signature.bind(*args, **kwargs).arguments["dataset"]
            with patched(dataset, "new_cache_text_encoder_outputs", encode_too):
                cache(*args, **kwargs)

        return cache_text

    def encode_too(original: Function) -> Function:
        def new_cache(models: Sequence[torch.nn.Module], *rest: Any) -> None:
            strategies = sys.modules["library.strategy_base"]
            tokenize = strategies.TokenizeStrategy.get_strategy()
            encode = strategies.TextEncodingStrategy.get_strategy()
            with torch.no_grad():
                empty[:] = encode.encode_tokens(tokenize, models, tokenize.tokenize([""]))
            original(models, *rest)

        return new_cache

    return wrap


def without_text(conds: Conds, empty: Sequence[Tensor | None], *, padded: bool = False) -> Conds:
    """Return a conditioning of the same form with the empty prompt in every row.

    Args:
        conds: Of a batch. Behind what encoders make there may be more that is no text, such as
            Anima's rates of caption dropout where text is cached.
        empty: Encoded empty prompt.
        padded: Batches are padded to their longest caption, with a mask.

    Raises:
        UnsupportedTraining: sd-scripts padded the batch to another length.
    """
    return with_text(conds, empty, padded=padded)


def with_text(conds: Conds, text: Sequence[Tensor | None], *, padded: bool = False) -> Conds:
    """Return a conditioning of the same form with other text, of one row or as many as it has."""
    parts = [conds] if isinstance(conds, Tensor) else list(conds)
    replaced = [
        part
        if part is None or plain is None
        else repeated(_padded(plain, part) if padded else plain, part).clone()
        for part, plain in zip_longest(parts, text)
    ]
    return replaced[0] if isinstance(conds, Tensor) else type(conds)(replaced)


def _padded(plain: Tensor, part: Tensor) -> Tensor:
    """Return the empty prompt [1 token ...] with zeros behind it, as long as a batch's text."""
    if part.ndim < 2 or part.shape[1] <= plain.shape[1]:
        return plain
    zeros = plain.new_zeros(1, part.shape[1] - plain.shape[1], *plain.shape[2:])
    return torch.cat([plain, zeros], 1)


class BatchSamples:
    """Names the samples of a batch by file, with the caption of the dataset.

    The batch's own caption may be shuffled or dropped, which would make many samples of one.
    """

    def __init__(self, dataset: Any):
        """Take the training dataset."""
        self._parts = getattr(dataset, "datasets", [dataset])
        self._samples: dict[str, Sample] = {}
        for part in self._parts:
            for key, info in getattr(part, "image_data", {}).items():
                caption = info.caption if isinstance(info.caption, str) else ""
                self._samples[key] = Sample(file=str(info.absolute_path), caption=caption)

    @property
    def files(self) -> list[str]:
        """Every image of the dataset."""
        return [sample.file for sample in self._samples.values()]

    @property
    def captions(self) -> list[str]:
        """Every caption of the dataset once."""
        return list(dict.fromkeys(sample.caption for sample in self._samples.values()))

    def show(self) -> None:
        """Make the dataset's batches hold the keys of their images, in worker processes too."""
        for part in self._parts:
            part.debug_dataset = True  # after the start it does this and nothing else

    def of(self, batch: Mapping[str, Any]) -> list[Sample]:
        """Return the samples of a batch, in its order.

        Raises:
            ValueError: The batch names no images: it is of a dataset class of the user's own.
        """
        if not (keys := batch.get("image_keys")):
            raise ValueError("The dataset's batches have no `image_keys`: samples have no name.")
        return [self._samples.get(key, Sample(file=str(key))) for key in keys]


@contextmanager
def _on(device: torch.device, models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Hold models on a device: with cached text the trainer has put them away."""
    with ExitStack() as undo:
        for model in models:
            undo.callback(model.to, next(model.parameters()).device)
            model.to(device)
        yield
