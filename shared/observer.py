"""Scores of images while they are sampled, from predictions that guidance computes anyway."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .families import Family, StableDiffusion
from .flow_families import family_of
from .schedules import DiscreteSchedule

NO_GUIDANCE = (
    "guidance was off, so no unconditional prediction was computed, and an observer adds no "
    "network call; sample with guidance_scale above 1, or use detect"
)
DISTILLED = (
    "the network guides itself, so no unconditional prediction was computed, and an observer adds "
    "no network call; give true_cfg_scale above 1 and a negative prompt, or use detect"
)


@dataclass(kw_only=True)
class ObservedRun:
    """One call of the pipeline."""

    prompts: tuple[str, ...]
    """As given; empty when embeddings were given instead."""
    negatives: tuple[str, ...]
    """As given; empty when none were."""
    negatives_are: str
    """What guidance moved away from: "empty prompt", "zeros", "prompts" or "embeddings"."""
    measurable: bool = False
    reason: str = "the pipeline stopped before its first step"
    """Why there are no scores; empty when there are."""
    _norms: list[Tensor] = field(default_factory=list, repr=False)
    _timesteps: list[Tensor | float] = field(default_factory=list, repr=False)
    _elements: int = 0
    _waiting: Tensor | None = field(default=None, repr=False)
    _schedule: DiscreteSchedule | None = field(default=None, repr=False)

    @property
    def comparable(self) -> bool:
        """Whether the scores compare with those of `detect`: negatives decide the score."""
        return self.measurable and self.negatives_are in ("empty prompt", "zeros")

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the network was told at each measured step (training timesteps, or flow time)."""
        return tuple(float(t) for t in self._timesteps)

    @property
    def l2(self) -> Tensor:
        """[image step] L2 norm of the text-conditional noise, float64 on the CPU."""
        if not self._norms:
            return torch.zeros(0, 0, dtype=torch.float64)
        norms = torch.stack(self._norms, dim=1).cpu().double()
        if self._schedule is None:
            return norms
        # eps = sqrt(abar) v + sqrt(1 - abar) x turns differences of velocities into those of noise.
        sigmas = self._schedule.table[[round(t) for t in self.timesteps]]
        return norms / (1 + sigmas**2).sqrt()

    @property
    def per_element(self) -> Tensor:
        """[image step] the same divided by the square root of the number of latent elements."""
        return self.l2 / max(1, self._elements) ** 0.5


@dataclass
class Record:
    """What was observed, in order."""

    runs: list[ObservedRun] = field(default_factory=list)


@contextmanager
def observe(pipeline: Any) -> Iterator[Record]:
    """Read scores from ordinary calls of `pipeline` inside the block.

    Nothing is added to the computation but a norm per step; images are bit-identical. Afterwards
    the pipeline carries no trace of the observer, also when a call or the block fails.
    """
    observer = _Observer(pipeline, family_of(pipeline))
    with ExitStack() as undo:
        undo.enter_context(_wrapped(pipeline, "encode_prompt", observer.on_encode))
        undo.enter_context(_wrapped(pipeline, "progress_bar", observer.on_start))
        network = getattr(pipeline, observer.family.network_name)
        handle = network.register_forward_hook(observer.on_forward, with_kwargs=True)
        undo.callback(handle.remove)
        yield observer.record


@contextmanager
def _wrapped(owner: Any, name: str, tell: Callable[..., None]) -> Iterator[None]:
    """Call `tell` with the arguments of each call of a method of this one object."""
    own, original = name in vars(owner), getattr(owner, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        tell(*args, **kwargs)
        return original(*args, **kwargs)

    vars(owner)[name] = method
    try:
        yield
    finally:
        if own:
            vars(owner)[name] = original
        else:
            vars(owner).pop(name, None)


class _Observer:
    """Follows a pipeline through encoding, the start of its loop, and each network call."""

    def __init__(self, pipeline: Any, family: type[Family]):
        self.pipeline, self.family = pipeline, family
        self.record = Record()
        self.texts: list[dict[str, Any]] = []
        self.separate = False
        self.discrete = issubclass(family, StableDiffusion)

    def on_encode(self, *args: Any, **kwargs: Any) -> None:
        """Remember the texts: the last argument names differ, the first is the prompt."""
        text = dict(kwargs)
        if args:
            text["prompt"] = args[0]
        if len(args) > 4 and self.family is StableDiffusion:
            text["negative_prompt"] = args[4]
            text.setdefault("negative_prompt_embeds", args[6] if len(args) > 6 else None)
        self.texts.append(text)

    def on_start(self, *args: Any, **kwargs: Any) -> None:
        """Begin a run: the pipeline opens its progress bar once, before its loop."""
        first = self.texts[0] if self.texts else {}
        negative = first.get("negative_prompt")
        embedded = first.get("negative_prompt_embeds") is not None
        # Flux encodes a second time for the negative prompt, and calls the network twice a step.
        self.separate = self.family.guidance_distilled and len(self.texts) > 1
        if self.separate:
            negative = self.texts[1].get("prompt")
            embedded = self.texts[1].get("prompt_embeds") is not None
        self.texts = []
        zeros = bool(self.pipeline.config.get("force_zeros_for_empty_prompt"))
        default = "zeros" if zeros and negative is None else "empty prompt"
        given = _as_tuple(negative)
        self.record.runs.append(
            ObservedRun(
                prompts=_as_tuple(first.get("prompt")),
                negatives=given,
                negatives_are="embeddings" if embedded else "prompts" if any(given) else default,
            )
        )
        if self.discrete and self.pipeline.scheduler.config.prediction_type == "v_prediction":
            self.record.runs[-1]._schedule = DiscreteSchedule(self.pipeline.scheduler.config)

    @torch.no_grad()
    def on_forward(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        """Measure one network call; returns None, so the output stays what it is."""
        if not self.record.runs or kwargs.get("skip_layers"):
            return
        run = self.record.runs[-1]
        prediction = output[0] if isinstance(output, tuple) else output.sample
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        if self.separate:
            if run._waiting is None:
                run._waiting = prediction
                return
            cond, uncond, run._waiting = run._waiting, prediction, None
        elif getattr(self.pipeline, "do_classifier_free_guidance", False):
            uncond, cond = prediction.chunk(2)
        else:
            run.reason = DISTILLED if self.family.guidance_distilled else NO_GUIDANCE
            return
        run.measurable, run.reason = True, ""
        run._elements = cond[0].numel()
        run._norms.append((cond.float() - uncond.float()).flatten(1).norm(dim=1))
        # Read later: a device must not be waited for inside somebody's sampling loop.
        run._timesteps.append(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)


def _as_tuple(texts: Any) -> tuple[str, ...]:
    return () if texts is None else (texts,) if isinstance(texts, str) else tuple(texts)
