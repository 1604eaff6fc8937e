"""Scores of images while they are sampled, from predictions that guidance computes anyway."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..arrays import Float, Tensor
from ..models.families import Family, family_of
from ..models.families.schedules import DiscreteSchedule
from ..score.calibration import Calibration
from ..score.clips import DIMENSIONS, ClipNorms, clip_norms
from ..score.noise_levels import input_scale
from .first_level import misfit
from .follower import Follower, Texts, argument_of, latent_size

NO_GUIDANCE = (
    "guidance was off, so no unconditional prediction was computed, and an observer adds no "
    "network call; sample with guidance_scale above 1, or use detect"
)
NO_CALIBRATION = (
    "it was observed without a calibration; give one to `observe` to have images judged"
)
DISTILLED = (
    "the network guides itself, so no unconditional prediction was computed, and an observer adds "
    "no network call; give true_cfg_scale above 1 and a negative prompt, or use detect"
)
NEVER_GUIDED = (
    "the network guides itself and its pipeline takes no negative prompt, so no unconditional "
    "prediction was computed, and an observer adds no network call; use detect"
)


@dataclass(kw_only=True)
class ObservedRun:
    """One call of the pipeline."""

    prompts: tuple[str, ...]
    """As given; empty when embeddings were given instead."""
    negatives: tuple[str, ...]
    """As given, those for further text encoders after the first's; empty when none were."""
    negatives_are: str
    """What guidance moved away from: "empty prompt", "zeros", "prompts" or "embeddings"."""
    measurable: bool = False
    reason: str = "the pipeline stopped before its first step"
    """Why there are no scores; empty when there are."""
    _residuals: Tensor | None = field(default=None, repr=False)
    _residual_reason: Callable[[float], str] = field(default=lambda _: NO_CALIBRATION, repr=False)
    _norms: list[Tensor] = field(default_factory=list, repr=False)
    _clips: list[Tensor] = field(default_factory=list, repr=False)
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
        return self._as_noise(torch.stack(self._norms, dim=1).cpu().double())

    @property
    def clips(self) -> ClipNorms | None:
        """[image step] parts of `l2` of videos: of each frame, of content and of motion.

        Float64 on the CPU; None for images and without scores. They are numbers and no verdicts.
        """
        if not self._clips:
            return None
        norms = torch.stack(self._clips, dim=1).cpu().double()
        return ClipNorms.unpacked(self._as_noise(norms.movedim(-1, 1)).movedim(1, -1))

    def _as_noise(self, norms: Float[Tensor, " *row step"]) -> Float[Tensor, " *row step"]:
        if self._schedule is None:
            return norms
        # eps = sqrt(abar) v + sqrt(1 - abar) x turns differences of velocities into those of noise.
        sigmas = self._schedule.table[[round(t) for t in self.timesteps]]
        return norms / input_scale(sigmas)

    @property
    def residual(self) -> Tensor | None:
        """[image] L2 norm, at the first step, of the text-conditional noise outside the controls'.

        Latent units, float64 on the CPU; None where it does not compare. It is what
        `calibration.observed` judges: its `flags` and `p_values` take it.
        """
        if self._residuals is None or self.residual_reason:
            return None
        return self._residuals.cpu().double()

    @property
    def residual_reason(self) -> str:
        """Why there is no residual; empty when there is."""
        return self._residual_reason(self.timesteps[0]) if self.measurable else self.reason

    @property
    def per_element(self) -> Tensor:
        """[image step] the same divided by the square root of the number of latent elements."""
        return self.l2 / max(1, self._elements) ** 0.5


@dataclass
class ObserverRecord:
    """The observed calls of a pipeline, in order."""

    runs: list[ObservedRun] = field(default_factory=list)


@contextmanager
def observe(
    pipeline: Any, calibration: Calibration | None = None, *, model: str | None = None
) -> Iterator[ObserverRecord]:
    """Read scores from ordinary calls of `pipeline` inside the block.

    Nothing is added to the computation but a norm per step, and with a calibration one projection
    per image; images are bit-identical. Afterwards the pipeline carries no trace of the observer,
    also when a call or the block fails. Around a guard it reads what the network answers, inside
    one what the guard makes of it.

    Args:
        pipeline: A diffusers text-to-image pipeline.
        calibration: Of this model, LoRA included, from two seeds or more: runs have the `residual`
            by which it judges images then. Runs that begin at another noise level, have another
            size or other negatives have a `residual_reason` instead; what else changes predictions
            (`clip_skip`, image prompts) is not noticed.
        model: Sha256 of the weights, to be compared with that of the calibration; None takes the
            caller's word that they belong together.

    Raises:
        ValueError: The pipeline is not supported.
        CalibrationError: The calibration judges no images.
        CalibrationMismatch: It was made with other weights or in another precision.
    """
    controls = None
    if calibration is not None:
        controls = _Controls(pipeline, calibration.require_observed(), model)
    observer = _Observer(pipeline, controls)
    with observer.following():
        yield observer.record


class _Observer(Follower):
    """Measures each network call of a pipeline's runs."""

    def __init__(self, pipeline: Any, controls: "_Controls | None"):
        super().__init__(pipeline)
        self.controls = controls
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
        if config.get("prediction_type") == "v_prediction":
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
        call = self.call(args, kwargs)
        prediction = self.family.prediction(output, call.latents)
        if self.separate:
            if run._waiting is None:
                run._waiting = prediction
                return
            cond, uncond, run._waiting = run._waiting, prediction, None
        elif self.family.guidance.calls == 1 and self.guided():
            first, second = prediction.chunk(2)
            cond, uncond = (first, second) if self.family.guidance.prompt_first else (second, first)
        else:
            run.reason = self._unguided()
            return
        difference = cond.float() - uncond.float()
        if self.controls is not None and not run.measurable:
            self.controls.measure(run, difference)
        run.measurable, run.reason = True, ""
        run._elements = cond[0].numel()
        run._norms.append(difference.flatten(1).norm(dim=1))
        if (clips := self.family.by_frame(self.pipeline, call, difference)) is not None:
            run._clips.append(clip_norms(clips).packed())
        # Read later: a device must not be waited for inside somebody's sampling loop.
        run._timesteps.append(call.time)

    def _unguided(self) -> str:
        if not self.family.guidance_distilled:
            return NO_GUIDANCE
        return DISTILLED if self.family.guidance.scale else NEVER_GUIDED


class _Controls:
    """Measures the residual of images outside of what controls add, where the two compare."""

    def __init__(self, pipeline: Any, observed: Calibration, model: str | None):
        scale = family_of(pipeline).pixels(pipeline)
        height, width = observed.latent_shape[-2:]
        self.pipeline, self.observed = pipeline, observed
        kind, size = family_of(pipeline), (height * scale, width * scale)
        self.family: Family = kind(pipeline, size)
        if len(observed.latent_shape) == DIMENSIONS:
            frames = (observed.latent_shape[1] - 1) * self.family.frames_per_latent + 1
            self.family = kind(pipeline, size, frames)
        self.schedule = self.family.schedule()
        now = {
            "parametrization": self.family.parametrization(),
            "dtype": str(self.family.network.dtype).removeprefix("torch."),
        }
        observed.check(observed.model if model is None else model, observed.settings | now)
        assert observed.basis is not None, "images are judged by residuals"
        self.basis = observed.basis.to(torch.device(pipeline._execution_device))

    def measure(self, run: ObservedRun, difference: Tensor) -> None:
        """Give a run the residuals of its images, and how to know whether they compare.

        Args:
            run: At its first predictions.
            difference: Of the network's predictions from prompt and negative, as it returns them.
        """
        shape, guidance = tuple(difference.shape[1:]), self._other_guidance(run)
        if self.family.packed:
            shape = (self.family.channels, *latent_size(self.pipeline, difference))
            if self.family.frames is not None:
                frames = int(argument_of(self.pipeline, "num_frames"))
                shape = (shape[0], (frames - 1) // self.family.frames_per_latent + 1, *shape[1:])

        def reason(timestep: float) -> str:
            sigma = self.schedule.sigma(self.family.training_timestep(timestep))
            return guidance or misfit(self.observed, shape, sigma)

        run._residual_reason = reason
        if shape == self.observed.latent_shape:
            if self.family.parametrization() == "v_prediction":  # at one x, as in `l2`
                difference = difference / input_scale(self.observed.settings["sigmas"][0])
            self.basis = self.basis.to(difference.device)
            rows = self.family.unpack(difference)
            run._residuals = self.basis.residual(rows, [0] * len(rows))

    def _other_guidance(self, run: ObservedRun) -> str:
        """Return how guidance differs from what the controls were measured with, "" if not."""
        expected = "zeros" if self.family.zero_unconditional else "empty prompt"
        if run.negatives_are != expected:
            remedy = "leave `negative_prompt` out" if expected == "zeros" else "give '' as one"
            return (
                f"guidance moved away from {run.negatives_are}, for the controls from "
                f"{expected}: {remedy}"
            )
        known = self.family.guidance_embedding
        if known is not None and self.family.network.config.get("guidance_embeds", True):
            name = self.family.guidance_input
            if (given := argument_of(self.pipeline, name)) != known:
                return f"the network read `{name}` {given}, for the controls {known}"
        return ""
