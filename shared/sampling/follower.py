"""A diffusers pipeline followed from outside: its prompts, its sampling loop, its network calls."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor

from ..models.families import Family, StableDiffusion, family_of
from ..patching import Function, patched

ENCODERS = ("", "_2", "_3")
"""What the names of arguments end in that hold a text for each text encoder."""
_FOLLOWED: ContextVar[bool] = ContextVar("followed", default=True)


@contextmanager
def unfollowed() -> Iterator[None]:
    """Call a followed pipeline's network for another purpose: no follower sees these calls."""
    token = _FOLLOWED.set(False)
    try:
        yield
    finally:
        _FOLLOWED.reset(token)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts of one call of the pipeline."""

    prompts: tuple[str, ...]
    """As given; empty when embeddings were given instead."""
    negatives: tuple[str, ...]
    """As given, those for further text encoders after the first's; empty when none were."""
    negatives_are: str
    """What guidance moves away from: "empty prompt", "zeros", "prompts" or "embeddings"."""
    separate: bool
    """The network is called twice a step, first for the prompts, then for the negatives."""


class Follower:
    """Base of an observer or a guard: the methods below are called as the pipeline runs."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.family: type[Family] = family_of(pipeline)
        self.network = getattr(pipeline, self.family.network_name)
        self._encoded: list[dict[str, Any]] = []

    def on_start(self, texts: Texts) -> None:
        """A run has come to its loop."""

    def on_end(self) -> None:
        """The loop is over, also by an exception."""

    def before(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Return other arguments for a network call; None leaves the very arguments."""

    def after(self, args: tuple, kwargs: dict, output: Any) -> Any:
        """Return another output of a network call; None leaves the very output."""

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
            for register, hook in (
                (self.network.register_forward_pre_hook, self._before),
                (self.network.register_forward_hook, self._after),
            ):
                undo.callback(register(hook, with_kwargs=True).remove)
            yield

    def _before(self, network: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return self.before(args, kwargs) if _FOLLOWED.get() else None

    def _after(self, network: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        return self.after(args, kwargs, output) if _FOLLOWED.get() else None

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

        @contextmanager
        def progress_bar(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                bar = original(*args, **kwargs)
                self.on_start(self._texts())
                with bar as inside:
                    yield inside
            finally:
                self.on_end()

        return progress_bar

    def _texts(self) -> Texts:
        first = self._encoded[0] if self._encoded else {}
        of_encoders = [first.get(f"negative_prompt{number}") for number in ENCODERS]
        embedded = first.get("negative_prompt_embeds") is not None
        # Flux encodes a second time for the negative prompt, and calls the network twice a step.
        separate = self.family.guidance_distilled and len(self._encoded) > 1
        if separate:
            of_encoders = [self._encoded[1].get(f"prompt{number}") for number in ENCODERS]
            embedded = self._encoded[1].get("prompt_embeds") is not None
        self._encoded = []
        default = "empty prompt"
        if of_encoders[0] is None and self.pipeline.config.get("force_zeros_for_empty_prompt"):
            of_encoders, default = [], "zeros"  # whatever the other encoders were given
        negatives = sum(map(_as_tuple, of_encoders), ())
        return Texts(
            prompts=_as_tuple(first.get("prompt")),
            negatives=negatives,
            negatives_are="embeddings" if embedded else "prompts" if any(negatives) else default,
            separate=separate,
        )


def prediction_of(output: Any) -> Tensor:
    """Return the prediction in what a diffusers network returns."""
    return output[0] if isinstance(output, tuple) else output.sample


def argument_of(pipeline: Any, name: str) -> float:
    """Return a number that was given to the pipeline's running call and is kept in no attribute.

    Flux's `true_cfg_scale` is such: inside ``pipeline("a cat", true_cfg_scale=4.0)``, in a hook of
    its network, this finds 4.0 among the local variables of the pipeline's `__call__`, a frame
    further up the stack.

    Raises:
        ValueError: No pipeline is running that has such an argument.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        # Reading a frame's values copies them all: only those of the one that has the argument.
        if name in frame.f_code.co_varnames and frame.f_locals.get("self") is pipeline:
            return float(frame.f_locals[name])
        frame = frame.f_back
    raise ValueError(
        f"{type(pipeline).__name__} has no argument `{name}`, so guidance cannot be followed: take "
        "a method that changes the prompt or the noise."
    )


def _as_tuple(texts: Any) -> tuple[str, ...]:
    return () if texts is None else (texts,) if isinstance(texts, str) else tuple(texts)
