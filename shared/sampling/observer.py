"""Scores of images while they are sampled, from predictions that guidance computes anyway."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.families import StableDiffusion
from ..models.families.schedules import DiscreteSchedule
from ..score.noise_levels import input_scale
from .follower import Follower, Texts, prediction_of

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
        """Times that the network read at the measured steps (training timesteps, or flow time)."""
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
        return norms / input_scale(sigmas)

    @property
    def per_element(self) -> Tensor:
        """[image step] the same divided by the square root of the number of latent elements."""
        return self.l2 / max(1, self._elements) ** 0.5


@dataclass
class ObserverRecord:
    """The observed calls of a pipeline, in order."""

    runs: list[ObservedRun] = field(default_factory=list)


@contextmanager
def observe(pipeline: Any) -> Iterator[ObserverRecord]:
    """Read scores from ordinary calls of `pipeline` inside the block.

    Nothing is added to the computation but a norm per step; images are bit-identical. Afterwards
    the pipeline carries no trace of the observer, also when a call or the block fails. Around a
    guard it reads what the network answers, inside one what the guard makes of it.
    """
    observer = _Observer(pipeline)
    with observer.following():
        yield observer.record


class _Observer(Follower):
    """Measures each network call of a pipeline's runs."""

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self.record = ObserverRecord()
        self.run: ObservedRun | None = None
        self.separate = False

    def on_start(self, texts: Texts) -> None:
        """Begin a run."""
        self.separate = texts.separate
        self.run = ObservedRun(
            prompts=texts.prompts, negatives=texts.negatives, negatives_are=texts.negatives_are
        )
        config = self.pipeline.scheduler.config
        discrete = issubclass(self.family, StableDiffusion)
        if discrete and config.prediction_type == "v_prediction":
            self.run._schedule = DiscreteSchedule(config)
        self.record.runs.append(self.run)

    def on_end(self) -> None:
        """End it: later calls of the network are another pipeline's."""
        self.run = None

    @torch.no_grad()
    def after(self, args: tuple, kwargs: dict, output: Any) -> None:
        """Measure one network call; returns None, so the output stays what it is."""
        run = self.run
        if run is None or kwargs.get("skip_layers"):
            return
        prediction = prediction_of(output)
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
