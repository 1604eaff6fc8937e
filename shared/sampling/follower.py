"""A diffusers pipeline followed from outside: its prompts, its sampling loop, its network calls."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor

from ..models.calls.hold import is_followed
from ..models.calls.network_call import NetworkCall, names_of
from ..models.families import Family, family_of
from ..patching import Function, patched


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
        self.names = names_of(self.network)
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
                if name == "progress_bar" or hasattr(self.pipeline, name):
                    undo.enter_context(patched(self.pipeline, name, wrap))
            for register, hook in (
                (self.network.register_forward_pre_hook, self._before),
                (self.network.register_forward_hook, self._after),
            ):
                undo.callback(register(hook, with_kwargs=True).remove)
            yield

    def _before(self, network: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return self.before(args, kwargs) if is_followed() else None

    def _after(self, network: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        return self.after(args, kwargs, output) if is_followed() else None

    def _around_check(self, original: Function) -> Function:
        """Forget what was encoded before: a call of the pipeline begins by checking its inputs."""

        def check_inputs(*args: Any, **kwargs: Any) -> Any:
            if is_followed():
                self._encoded = []
            return original(*args, **kwargs)

        return check_inputs

    def _around_encode(self, original: Function) -> Function:
        """Remember the texts of calls that the pipeline's own call makes."""
        signature = inspect.signature(original)
        # Where no check of inputs begins a run, what its own call does not encode is the user's.
        checked = hasattr(self.pipeline, "check_inputs")

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            if is_followed() and (checked or local_of(self.pipeline, "self")):
                # Copied: Z-Image writes its template into the very list of prompts.
                given = signature.bind(*args, **kwargs).arguments
                self._encoded.append({
                    name: list(value) if isinstance(value, list) else value
                    for name, value in given.items()
                })  # fmt: skip
            return original(*args, **kwargs)

        return encode_prompt

    def _around_loop(self, original: Function) -> Function:
        """Begin and end a run: the pipeline opens its progress bar once, around its loop."""

        @contextmanager
        def progress_bar(*args: Any, **kwargs: Any) -> Iterator[Any]:
            if not is_followed():
                with original(*args, **kwargs) as inside:
                    yield inside
                return
            try:
                bar = original(*args, **kwargs)
                self.on_start(self._texts())
                with bar as inside:
                    yield inside
            finally:
                self.on_end()

        return progress_bar

    def _texts(self) -> Texts:
        encoded, self._encoded = self._encoded, []
        first, guidance = encoded[0] if encoded else {}, self.family.guidance
        negatives, own = _ordered(first, "negative_prompt"), first.get("negative_prompt")
        embedded = first.get("negative_prompt_embeds") is not None
        guided = self.guided()
        # Without a negative in the first call there is a second one for the negatives.
        if guided and len(encoded) > 1 and not any("negative" in name for name in first):
            negatives, own = _ordered(encoded[1], "prompt"), encoded[1].get("prompt")
            embedded = encoded[1].get("prompt_embeds") is not None
        default = "empty prompt"
        if own is None and self.pipeline.config.get("force_zeros_for_empty_prompt"):
            negatives, default = (), "zeros"  # whatever the other encoders were given
        return Texts(
            prompts=_as_tuple(first.get("prompt")),
            negatives=negatives,
            negatives_are="embeddings" if embedded else "prompts" if any(negatives) else default,
            separate=guided and guidance.calls == 2,
        )

    def guided(self) -> bool:
        """Return whether the running call is guided by negatives."""
        if not self.family.guidance.scale:
            return False
        known = getattr(self.pipeline, "do_classifier_free_guidance", None)
        if known is None:
            known = local_of(self.pipeline, *GUIDED)
        if hasattr(known, "num_conditions"):  # HunyuanImage's guider
            return bool(known._enabled and known.num_conditions > 1)
        return bool(known)

    def call(self, args: tuple, kwargs: dict[str, Any]) -> NetworkCall:
        """Return a network call whose latents and time can be read."""
        return NetworkCall(args=args, kwargs=kwargs, names=self.names)


GUIDED = ("do_true_cfg", "do_classifier_free_guidance", "guider")
"""Local variables in which pipelines keep whether they are guided, where no attribute says it."""


def argument_of(pipeline: Any, name: str) -> float:
    """Return a number that was given to the pipeline's running call and is kept in no attribute.

    Flux's `true_cfg_scale` is such: inside ``pipeline("a cat", true_cfg_scale=4.0)``, in a hook of
    its network, this finds 4.0 among the local variables of the pipeline's `__call__`, a frame
    further up the stack.

    Raises:
        ValueError: No pipeline is running that has such an argument.
    """
    value = local_of(pipeline, name)
    if value is None:
        raise ValueError(
            f"{type(pipeline).__name__} has no argument `{name}`, so guidance cannot be followed: "
            "take a method that changes the prompt or the noise."
        )
    return float(value)


def local_of(pipeline: Any, *names: str) -> Any:
    """Return the first of these local variables of the pipeline's running `__call__`, or None."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        # Reading a frame's values copies them all: only those of the one that has the variable.
        for name in names:
            if name in frame.f_code.co_varnames and frame.f_locals.get("self") is pipeline:
                if name in frame.f_locals:
                    return frame.f_locals[name]
        frame = frame.f_back
    return None


def latent_size(pipeline: Any, latents: Tensor) -> tuple[int, int]:
    """Return height and width of the latents of the pipeline's running call, unpacked."""
    family = family_of(pipeline)
    if not family.packed:
        height, width = latents.shape[-2:]
        return height, width
    # Patches in a row do not show how they lie.
    scale = family.pixels(pipeline)
    multiple = scale * family.patch
    height, width = (int(argument_of(pipeline, side)) for side in ("height", "width"))
    return (height - height % multiple) // scale, (width - width % multiple) // scale


def _ordered(given: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return the texts for all text encoders, the first one's first."""
    ends = ("", "_2", "_3", "_4")
    return sum((_as_tuple(given.get(f"{name}{end}")) for end in ends), ())


def _as_tuple(texts: Any) -> tuple[str, ...]:
    return () if texts is None else (texts,) if isinstance(texts, str) else tuple(texts)
