"""Mitigation around an ordinary diffusers pipeline, for as long as a block lasts.

with guard(pipeline, calibration=calibration) as record:
    images = pipeline("a caption", num_images_per_prompt=4).images
for image in record.runs[0].images:
    print(image.fired, image.score_before, image.threshold, image.score_after)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..mitigation import DEFAULT, make_method
from ..mitigation.gate import AppliedGate, Gate, GuardedImage
from ..mitigation.method import Method, Mitigation, Start
from ..models.adapter import PipelineDenoiser
from ..models.calls.hold import unfollowed
from ..models.calls.network_call import NetworkCall
from ..score.calibration import Calibration
from ..score.denoiser import Conditioning
from ..score.metrics import text_noise_norm
from .follower import Follower, Texts, latent_size
from .mitigated_run import MitigatedRun

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


class GuidanceIsOff(ValueError):
    """A method that acts on guidance met a run without it."""


@dataclass(kw_only=True)
class GuardedRun:
    """One call of the pipeline."""

    images: tuple[GuardedImage, ...] = ()
    """In order; empty when the pipeline stopped before its first step."""


@dataclass(kw_only=True)
class GuardRecord:
    """What the guard did, in order."""

    runs: list[GuardedRun] = field(default_factory=list)
    caveat: str = ""
    """Why the calibration need not hold here, when it was forced; print it with the scores."""


@contextmanager
def guard(
    pipeline: Any,
    *,
    method: Method | str = DEFAULT,
    calibration: Calibration | None = None,
    gate: str = "calibrated",
    seed: int = 0,
    model: str | None = None,
    force: bool = False,
) -> Iterator[GuardRecord]:
    """Mitigate calls of `pipeline` inside the block, image by image, where the gate says so.

    Images on which the method does not act are bit-identical to those of the same call without a
    guard. The prompts of a run are scored before its first step, as an audit scores them: at the
    calibration's size whatever that of the run, at a cost of one network row per seed of the
    calibration and prompt that was not seen before; weights, LoRA and their strength must stay as
    they are inside the block. Afterwards the pipeline carries
    no trace, also when something fails.

    Args:
        pipeline: A diffusers text-to-image pipeline. Its arguments stay as they are: any
            scheduler, batch, number of images, negative prompts, embeddings, callbacks.
        method: From `shared.mitigation`, or its name there, with the settings it has by default.
        calibration: Of this model, LoRA included; its threshold decides.
        gate: "calibrated" acts on prompts that score above the threshold, "always" on all,
            "never" on none.
        seed: Of what the method draws, the same in every run.
        model: Sha256 of the weights, to be compared with that of the calibration; None takes the
            caller's word that they belong together.
        force: Use a calibration that was made under other conditions.

    Raises:
        ValueError: The pipeline is not supported or guarded already, or there is no calibration.
        CalibrationMismatch: The calibration was made under other conditions.
        GuidanceIsOff: On sampling without guidance when that is what the method acts on.
    """
    guarding = PipelineGuard(
        pipeline,
        make_method(method) if isinstance(method, str) else method,
        Gate(mode=gate, calibration=calibration),
        seed,
        model,
        force,
    )
    with guarding.following():
        yield guarding.record


class PipelineGuard(Follower):
    """Decides about the images of each run at its first network call, and undoes what it did."""

    def __init__(
        self, pipeline: Any, method: Method, gate: Gate, seed: int, model: str | None, force: bool
    ):
        super().__init__(pipeline)
        if all(getattr(pipeline, name, None) is None for name in ENCODERS):
            raise ValueError(
                "The pipeline has no text encoder, and scores compare with the empty prompt: load "
                "it with its text encoder; prompts may be given as embeddings all the same."
            )
        if self.family.video:
            raise ValueError(
                f"The guard acts on images, and {type(pipeline).__name__} makes videos: score its "
                "prompts with detect, its runs with observe."
            )
        for hook in self.network._forward_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, PipelineGuard) and other.pipeline is pipeline:
                raise ValueError("The pipeline is guarded already: leave that block first.")
        self.method, self.gate, self.seed = method, gate, seed
        size = None if gate.calibration is None else gate.calibration.latent_shape[-2:]
        self._denoisers: dict[tuple[int, ...] | None, PipelineDenoiser] = {}
        self.denoiser = self._denoiser(size)
        self._denoisers[tuple(self.denoiser.latent_shape[-2:])] = self.denoiser
        self.record = GuardRecord(caveat=gate.check(self.denoiser, model=model, force=force))
        self.applied = AppliedGate(gate, self.denoiser)
        self.undecided: Texts | None = None  # of a run before its first network call
        self.run: MitigatedRun | None = None

    def on_start(self, texts: Texts) -> None:
        """Begin a run."""
        self.undecided = texts
        self.record.runs.append(GuardedRun())

    def on_end(self) -> None:
        """End it: later calls of the network are another pipeline's."""
        run, self.run, self.undecided = self.run, None, None
        if run is not None:
            run.close()

    def before(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Decide at the first call of a run, then replace what the network reads."""
        if self.undecided is not None:
            texts, self.undecided = self.undecided, None
            self._begin(self.denoiser.family.call(args, kwargs), texts)
        if self.run is None:
            return None
        call = self.run.prepare(self.denoiser.family.call(args, kwargs))
        return call.args, call.kwargs

    def after(self, args: tuple, kwargs: dict, output: Any) -> Any:
        """Replace what the network answers."""
        if self.run is None:
            return None
        call = self.denoiser.family.call(args, kwargs)
        return self.run.answer(self.network, call, output)

    def _begin(self, call: NetworkCall, texts: Texts) -> None:
        """Decide about each image, and let the method start on those that fired."""
        guidance = self.family.guidance
        together = guidance.calls == 1 and self.guided()
        if self.method.needs_guidance and self.gate.mode != "never":
            self._check_guidance(together or texts.separate)
        images = len(call.latents) // 2 if together else len(call.latents)
        first = images if together and not guidance.prompt_first else 0
        rows = list(range(first, first + images))
        per_prompt = len(rows) // max(1, len(texts.prompts))
        prompts = tuple(prompt for prompt in texts.prompts for _ in range(per_prompt))
        with unfollowed():
            decisions = self.applied.decide(self._scored(call, rows, prompts), prompts)
        decided = [
            GuardedImage(
                prompt=prompts[image] if prompts else None,
                fired=decision.fired,
                threshold=self.gate.threshold,
                score_before=decision.score,
                method=self.method.name if decision.fired else None,
            )
            for image, decision in enumerate(decisions)
        ]
        run = self.record.runs[-1]
        run.images = tuple(decided)  # stands there also when the method refuses
        if fired := [image for image, decision in enumerate(decisions) if decision.fired]:
            denoiser = self._denoiser(latent_size(self.pipeline, call.latents))
            # Before it starts: the end of the loop closes it whatever happens.
            self.run = MitigatedRun(denoiser, images=images, fired=fired, follower=self,
                                    separate=texts.separate)  # fmt: skip
            changes = self._act(self.run, call, tuple(prompts[i] for i in fired if prompts))
            for image, change in zip(fired, changes, strict=True):
                decided[image] = replace(decided[image], **change)
            run.images = tuple(decided)

    def _scored(
        self, call: NetworkCall, rows: Sequence[int], prompts: Sequence[str]
    ) -> Conditioning:
        """Return the text by which the gate decides: at the size and length of an audit."""
        cond = call.conditioning(rows)
        if prompts and (self.family.one_by_one or cond.others):
            distinct = list(dict.fromkeys(prompts))
            encoded = self.denoiser.encode(distinct)
            return encoded[[distinct.index(prompt) for prompt in prompts]]
        return cond

    def _act(
        self, run: MitigatedRun, call: NetworkCall, prompts: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        """Start the method, and return what it changed, per image, as fields of its record."""
        calibration = self.gate.calibration
        if calibration is not None:
            calibration = calibration.at_size(run.denoiser.latent_shape)
        start = run.start(
            self.method,
            call,
            sigma=self.applied.sigma,
            empty=self.empty,
            prompts=prompts,
            seed=self.seed,
            calibration=calibration,
            gate=self.applied,
        )
        with unfollowed():
            return self._measure(run.mitigation, start, prompts)

    @torch.no_grad()
    def _measure(
        self, mitigation: Mitigation, start: Start, prompts: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        measured: list[dict[str, Any]] = [{} for _ in range(len(start.cond))]
        cond = mitigation.cond or start.cond
        if mitigation.cond is not None and (scores := self.applied.scores(cond, prompts)):
            measured = [{"score_after": score} for score in scores]
        for fields, change in zip(measured, mitigation.changes, strict=False):
            fields["change"] = change
        if mitigation.x is not None:
            x, empty = mitigation.x.detach(), self.empty[[0] * len(start.cond)]
            before = _magnitude(start, start.x0_uncond, start.x, start.cond)
            after = _magnitude(start, start.denoiser.denoise(x, start.sigma, empty), x, cond)
            for fields, one, other in zip(measured, before, after, strict=True):
                fields.update(noise_before=one, noise_after=other)
        return measured

    @cached_property
    def empty(self) -> Conditioning:
        """What guidance moves away from by default."""
        with torch.inference_mode(False):
            return self.denoiser.unconditional()

    def _denoiser(self, size: tuple[int, ...] | None) -> PipelineDenoiser:
        """Return the pipeline as a denoiser of latents of this height and width."""
        if size not in self._denoisers:
            factor = self.family.pixels(self.pipeline)
            pixels = None if size is None else (size[0] * factor, size[1] * factor)
            self._denoisers[size] = PipelineDenoiser(self.pipeline, resolution=pixels)
        return self._denoisers[size]

    def _check_guidance(self, guided: bool) -> None:
        if guided:
            return
        guidance = self.family.guidance
        scale = f"`{guidance.scale}` above {guidance.off:g}"
        if guidance.negative:
            scale += " and a `negative_prompt`, '' for example"
        if not guidance.scale:
            raise GuidanceIsOff(
                f"The method {self.method.name!r} acts on guidance, and this pipeline takes no "
                "negative prompt: take a method that changes the prompt or the noise."
            )
        raise GuidanceIsOff(
            f"The method {self.method.name!r} acts on guidance, which is off in this run: give "
            f"{scale}, or take a method that changes the prompt or the noise."
        )


def _magnitude(start: Start, x0_uncond: Tensor, x: Tensor, cond: Conditioning) -> list[float]:
    """Return |D| of each image at the noise `x`."""
    x0_cond = start.denoiser.denoise(x, start.sigma, cond)
    return (text_noise_norm(x0_cond, x0_uncond) / start.sigma).tolist()
