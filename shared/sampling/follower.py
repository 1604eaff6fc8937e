"""Following a diffusers pipeline from outside: what it was asked for, where its loop is."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..models.families import Family, StableDiffusion, family_of
from ..patching import Function, patched

_WATCHING: ContextVar[bool] = ContextVar("watching", default=True)


def watching() -> bool:
    """Return whether calls of the network belong to the runs of followed pipelines."""
    return _WATCHING.get()


@contextmanager
def unwatched() -> Iterator[None]:
    """Call a followed pipeline's network for something else: inside, no call is a run's."""
    token = _WATCHING.set(False)
    try:
        yield
    finally:
        _WATCHING.reset(token)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What one call of the pipeline was asked for."""

    prompts: tuple[str, ...]
    """As given; empty when embeddings were given instead."""
    negatives: tuple[str, ...]
    """As given; empty when none were."""
    negatives_are: str
    """What guidance moves away from: "empty prompt", "zeros", "prompts" or "embeddings"."""
    separate: bool
    """The network is called twice a step, first for the prompts, then for the negatives."""


class Follower:
    """Told of each run of a pipeline; a base for those who also look at its network calls."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.family: type[Family] = family_of(pipeline)
        self._encoded: list[dict[str, Any]] = []

    def on_start(self, texts: Texts) -> None:
        """A run has come to its loop."""

    def on_end(self) -> None:
        """The loop is over, also by an exception."""

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the pipeline inside the block; afterwards it carries no trace."""
        with ExitStack() as undo:
            for name, wrap in (
                ("check_inputs", self._around_check),
                ("encode_prompt", self._around_encode),
                ("progress_bar", self._around_loop),
            ):
                undo.enter_context(patched(self.pipeline, name, wrap))
            yield

    def _around_check(self, original: Function) -> Function:
        """Forget what was encoded before: a call of the pipeline begins by checking its inputs."""

        def check_inputs(*args: Any, **kwargs: Any) -> Any:
            self._encoded = []
            return original(*args, **kwargs)

        return check_inputs

    def _around_encode(self, original: Function) -> Function:
        """Remember the texts: the last argument names differ, the first is the prompt."""

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            text = dict(kwargs)
            if args:
                text["prompt"] = args[0]
            if len(args) > 4 and self.family is StableDiffusion:
                text["negative_prompt"] = args[4]
                text.setdefault("negative_prompt_embeds", args[6] if len(args) > 6 else None)
            self._encoded.append(text)
            return original(*args, **kwargs)

        return encode_prompt

    def _around_loop(self, original: Function) -> Function:
        """Begin and end a run: the pipeline opens its progress bar once, around its loop."""

        def progress_bar(*args: Any, **kwargs: Any) -> Any:
            return self._loop(original(*args, **kwargs))

        return progress_bar

    @contextmanager
    def _loop(self, bar: Any) -> Iterator[Any]:
        try:
            self.on_start(self._texts())
            with bar as inside:
                yield inside
        finally:
            self.on_end()

    def _texts(self) -> Texts:
        first = self._encoded[0] if self._encoded else {}
        negative = first.get("negative_prompt")
        embedded = first.get("negative_prompt_embeds") is not None
        # Flux encodes a second time for the negative prompt, and calls the network twice a step.
        separate = self.family.guidance_distilled and len(self._encoded) > 1
        if separate:
            negative = self._encoded[1].get("prompt")
            embedded = self._encoded[1].get("prompt_embeds") is not None
        self._encoded = []
        zeros = bool(self.pipeline.config.get("force_zeros_for_empty_prompt"))
        default = "zeros" if zeros and negative is None else "empty prompt"
        given = _as_tuple(negative)
        return Texts(
            prompts=_as_tuple(first.get("prompt")),
            negatives=given,
            negatives_are="embeddings" if embedded else "prompts" if any(given) else default,
            separate=separate,
        )


def prediction_of(output: Any) -> Tensor:
    """Return the prediction in what a diffusers network returns."""
    return output[0] if isinstance(output, tuple) else output.sample


def argument_of(pipeline: Any, name: str) -> float:
    """Return a number that was given to the pipeline's running call and is kept in no attribute.

    Raises:
        ValueError: No pipeline is running that has such an argument.
    """
    frame = sys._getframe()
    while frame is not None:
        # Asking a frame for its values copies them all: only the one that has the argument.
        if name in frame.f_code.co_varnames and frame.f_locals.get("self") is pipeline:
            return float(frame.f_locals[name])
        frame = frame.f_back
    raise ValueError(
        f"{type(pipeline).__name__} has no argument `{name}`, so guidance cannot be followed: take "
        "a method that changes the prompt or the noise."
    )


def _as_tuple(texts: Any) -> tuple[str, ...]:
    return () if texts is None else (texts,) if isinstance(texts, str) else tuple(texts)
