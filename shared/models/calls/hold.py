"""A pipeline's own call, run up to its first network call, which is held instead of made."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...patching import Function, patched
from .network_call import NetworkCall, NotFollowed, names_of
from .quiet import quiet

_FOLLOWED: ContextVar[bool] = ContextVar("followed", default=True)


def is_followed() -> bool:
    """Return whether a follower of a pipeline is to see what is called now."""
    return _FOLLOWED.get()


@contextmanager
def unfollowed() -> Iterator[None]:
    """Call a followed pipeline or its network for another purpose: no follower sees these calls."""
    token = _FOLLOWED.set(False)
    try:
        yield
    finally:
        _FOLLOWED.reset(token)


class _Reached(BaseException):
    """The network call; no pipeline catches it as an error of its own."""

    def __init__(self, network: nn.Module, args: tuple, kwargs: dict[str, Any]):
        super().__init__()
        self.network, self.args_held, self.kwargs_held = network, args, kwargs


@dataclass(frozen=True, kw_only=True)
class HeldCall:
    """The first network call of a pipeline's run, and what the run had prepared for it."""

    network: nn.Module
    """The network that would have been called: some pipelines have one for each noise level."""
    call: NetworkCall
    sigmas: Tensor | None
    """Noise levels of the run, [steps + 1]; None for schedulers that keep none."""
    timesteps: Tensor
    """Times of the scheduler, [step]."""
    noise_dtype: torch.dtype | None
    """In which the starting noise was drawn; None where the pipeline has no method for it."""
    size: tuple[int, int] | None
    """Height and width in pixels that the run settled on, None where nothing tells."""


def hold(
    pipeline: Any,
    networks: Sequence[nn.Module],
    prompts: Sequence[str],
    *,
    scheduler: Any,
    steps: int,
    arguments: Mapping[str, Any],
    time: float | None = None,
    texts: list[Any] | None = None,
    graph: bool = False,
    second: bool = False,
) -> HeldCall:
    """Run the pipeline's own call and return its first network call, which is not made.

    The pipeline is left as it was: its attributes, its scheduler, followers that watch it.

    Args:
        pipeline: Of diffusers.
        networks: Those that it may call.
        prompts: One an image; all images start from the same noise.
        scheduler: Stands in for the pipeline's during the call.
        steps: Of the run.
        arguments: Of the pipeline's call, besides these; those that it does not take are left out.
        time: Of the scheduler, to begin at; None for its own.
        texts: What `encode_prompt` returned in an earlier call, which then is not asked again; an
            empty list is filled.
        graph: Keep the graph to the text encoders: the call runs without its `torch.no_grad`.
        second: Hold the second call instead; the first returns what it was given.

    Raises:
        NotFollowed: The call ended before it reached a network, or the second call belongs to
            another step.
    """
    kept = dict(vars(pipeline))
    drawn: dict[str, Any] = {}
    try:
        with ExitStack() as undo:
            undo.enter_context(quiet())
            undo.enter_context(unfollowed())
            vars(pipeline)["scheduler"] = scheduler
            vars(pipeline)["_progress_bar_config"] = {"disable": True}
            if time is not None:
                undo.enter_context(
                    patched(scheduler, "set_timesteps", _beginning_at(scheduler, time))
                )
            if hasattr(pipeline, "prepare_latents"):
                undo.enter_context(patched(pipeline, "prepare_latents", _noting(drawn)))
            if texts is not None and hasattr(pipeline, "encode_prompt"):
                undo.enter_context(patched(pipeline, "encode_prompt", _once(texts)))
            stop = _Stop(second)
            for network in networks:
                hook = network.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
                undo.callback(hook.remove)
                if second:
                    undo.enter_context(_passing(network))
            if not graph:
                undo.enter_context(torch.inference_mode(False))
                undo.enter_context(torch.no_grad())
            _run(pipeline, prompts, steps, arguments, graph)
    except _Reached as reached:
        return HeldCall(
            network=reached.network,
            call=NetworkCall(args=reached.args_held, kwargs=reached.kwargs_held,
                             names=names_of(reached.network)),
            sigmas=getattr(scheduler, "sigmas", None),
            timesteps=scheduler.timesteps,
            noise_dtype=drawn.get("dtype"),
            size=drawn.get("size"),
        )  # fmt: skip
    finally:
        vars(pipeline).clear()
        vars(pipeline).update(kept)
    raise NotFollowed("its call ended without calling its network")


def accepted(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arguments that the pipeline's call takes."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    return {name: value for name, value in arguments.items() if name in takes}


def _run(
    pipeline: Any, prompts: Sequence[str], steps: int, arguments: Mapping[str, Any], graph: bool
) -> None:
    given = {
        "prompt": list(prompts),
        "num_inference_steps": steps,
        "output_type": "latent",
        "generator": [torch.Generator("cpu").manual_seed(0) for _ in prompts],
        **arguments,
    }
    call = type(pipeline).__call__
    (inspect.unwrap(call) if graph else call)(pipeline, **accepted(pipeline, given))


class _Stop:
    """A hook that stops at the first call of a network, or at the second of one step."""

    def __init__(self, second: bool):
        self.second = second
        self.time: float | None = None

    def __call__(self, network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        time = float(NetworkCall(args=args, kwargs=kwargs, names=names_of(network)).time)
        if self.second and self.time is None:
            self.time = time
            return
        if self.second and self.time != time:
            raise NotFollowed("its network is called once a step")
        raise _Reached(network, args, dict(kwargs))


@contextmanager
def _passing(network: nn.Module) -> Iterator[None]:
    """Let a network return the latents that it is given, unseen by whoever hooked into it."""

    def wrap(original: Function) -> Function:
        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor]:
            return (NetworkCall(args=args, kwargs=kwargs, names=names_of(network)).latents,)

        return forward

    hooks = vars(network)["_forward_hooks"]
    vars(network)["_forward_hooks"] = type(hooks)()
    try:
        with patched(network, "forward", wrap):
            yield
    finally:
        vars(network)["_forward_hooks"] = hooks


def _beginning_at(scheduler: Any, time: float) -> Callable[[Function], Function]:
    """Let a scheduler's first time be `time`; the others are of no matter, no step is made."""

    def wrap(original: Function) -> Function:
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            scheduler.timesteps = scheduler.timesteps.clone()
            scheduler.timesteps[0] = time

        return set_timesteps

    return wrap


def _noting(drawn: dict[str, Any]) -> Callable[[Function], Function]:
    """Note the precision and the size that the starting noise is asked for in."""

    def wrap(original: Function) -> Function:
        names = inspect.signature(original)

        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            given = names.bind(*args, **kwargs).arguments
            drawn["dtype"] = given.get("dtype")
            if "height" in given and "width" in given:
                drawn["size"] = int(given["height"]), int(given["width"])
            return original(*args, **kwargs)

        return prepare_latents

    return wrap


def _once(texts: list[Any]) -> Callable[[Function], Function]:
    """Answer with what was answered before, or keep the answers of the first time."""
    known = iter(list(texts)) if texts else None

    def wrap(original: Function) -> Function:
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            if known is not None:
                return copy.copy(next(known))
            texts.append(original(*args, **kwargs))
            return copy.copy(texts[-1])

        return encode_prompt

    return wrap
