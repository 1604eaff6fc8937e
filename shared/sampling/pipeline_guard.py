"""The guard at work: asks the gate once per run, and lets the method act from there."""

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..mitigation.gate import Gate, Probe
from ..mitigation.method import Method, Start
from ..models.adapter import PipelineDenoiser
from ..score.calibration import Calibration
from ..score.denoiser import Conditioning
from ..score.metrics import text_noise_norm
from .follower import Follower, Texts, unwatched, watching
from .guard_record import GuardedImage, GuardedRun, GuardRecord
from .mitigated_run import MitigatedRun
from .network_call import NetworkCall

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class GuidanceIsOff(ValueError):
    """A method that acts on guidance met a run without it."""


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
        self.method, self.gate, self.seed = method, gate, seed
        shape = gate.calibration.settings["latent_shape"][-2:] if gate.calibration else None
        self.denoiser = PipelineDenoiser(pipeline, resolution=self._pixels(shape))
        self.denoisers = {tuple(self.denoiser.latent_shape[-2:]): self.denoiser}
        self.record = GuardRecord(caveat=gate.check(self.denoiser, model=model, force=force))
        self.probe = Probe(gate, self.denoiser)
        self.texts: Texts | None = None
        self.undecided = False
        self.run: MitigatedRun | None = None

    def on_start(self, texts: Texts) -> None:
        """Begin a run."""
        self.texts, self.undecided = texts, True
        self.record.runs.append(GuardedRun())

    def on_end(self) -> None:
        """End it: later calls of the network are another pipeline's."""
        run, self.run, self.undecided = self.run, None, False
        if run is not None:
            run.close()

    def before(self, network: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Replace what the network reads; None leaves the very arguments."""
        if not watching():
            return None
        call = NetworkCall(args=args, kwargs=kwargs)
        if self.undecided:
            self.undecided = False
            self._begin(call)
        if self.run is None:
            return None
        call = self.run.prepare(call)
        return call.args, call.kwargs

    def after(self, network: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Replace what the network answers; None leaves the very output."""
        if self.run is None or not watching():
            return None
        return self.run.answer(network, NetworkCall(args=args, kwargs=kwargs), output)

    def _begin(self, call: NetworkCall) -> None:
        """Decide about each image, and let the method start on those that fired."""
        texts, together = self.texts, getattr(self.pipeline, "do_classifier_free_guidance", False)
        if self.method.needs_guidance and self.gate.mode != "never":
            self._check_guidance(together or texts.separate)
        first = len(call.latents) // 2 if together else 0
        rows = list(range(first, len(call.latents)))
        per_prompt = len(rows) // max(1, len(texts.prompts))
        prompts = tuple(prompt for prompt in texts.prompts for _ in range(per_prompt))
        cond = Conditioning(
            embeddings=call.embeddings[rows],
            pooled=None if call.pooled is None else call.pooled[rows],
        )
        with unwatched():
            decisions = self.probe.decide(cond, prompts)
        fired = [image for image, decision in enumerate(decisions) if decision.fired]
        self.record.runs[-1].images = tuple(
            GuardedImage(
                prompt=prompts[image] if prompts else None,
                fired=decision.fired,
                threshold=self.gate.threshold,
                score_before=decision.score,
                method=self.method.name if decision.fired else None,
            )
            for image, decision in enumerate(decisions)
        )
        if fired:
            self._act(call, len(rows), fired, tuple(prompts[i] for i in fired if prompts))

    def _act(
        self, call: NetworkCall, images: int, fired: list[int], prompts: tuple[str, ...]
    ) -> None:
        denoiser = self._denoiser(call.latent_size)
        self.run = MitigatedRun(denoiser, images=images, fired=fired, separate=self.texts.separate)
        start = self.run.start(
            self.method,
            call,
            sigma=self.probe.sigma,
            empty=self.empty,
            prompts=prompts,
            seed=self.seed,
            calibration=_at_size(self.gate.calibration, denoiser.latent_shape),
        )
        with unwatched():
            measured = self._measure(start, prompts)
        run = self.record.runs[-1]
        changes = dict(zip(fired, measured, strict=True))
        run.images = tuple(
            replace(image, **changes.get(at, {})) for at, image in enumerate(run.images)
        )

    @torch.no_grad()
    def _measure(self, start: Start, prompts: tuple[str, ...]) -> list[dict[str, float]]:
        """Return what changed, per image, as fields of its record."""
        mitigation, measured = self.run.mitigation, [{} for _ in range(len(start.cond))]
        cond = mitigation.cond or start.cond
        if mitigation.cond is not None:
            scores = self.probe.scores(cond, prompts)
            measured = [{"score_after": score} for score in scores] if scores else measured
        if mitigation.x is not None:
            x, empty = mitigation.x.detach(), self.empty[[0] * len(start.cond)]
            before = self._magnitude(start, start.x0_uncond, start.x, start.cond)
            x0_uncond = start.denoiser.denoise(x, start.sigma, empty)
            after = self._magnitude(start, x0_uncond, x, cond)
            for fields, one, other in zip(measured, before, after, strict=True):
                fields.update(noise_before=one, noise_after=other)
        return measured

    def _magnitude(
        self, start: Start, x0_uncond: Tensor, x: Tensor, cond: Conditioning
    ) -> list[float]:
        x0_cond = start.denoiser.denoise(x, start.sigma, cond)
        return (text_noise_norm(x0_cond, x0_uncond) / start.sigma).tolist()

    @cached_property
    def empty(self) -> Conditioning:
        """What guidance moves away from by default."""
        with torch.inference_mode(False):
            return self.denoiser.unconditional()

    def _denoiser(self, size: tuple[int, int]) -> PipelineDenoiser:
        """Return the pipeline as a denoiser of latents of this height and width."""
        if size not in self.denoisers:
            self.denoisers[size] = PipelineDenoiser(self.pipeline, resolution=self._pixels(size))
        return self.denoisers[size]

    def _pixels(self, size: Any) -> tuple[int, int] | None:
        if size is None:
            return None
        height, width = (side * self.pipeline.vae_scale_factor for side in size)
        return height, width

    def _check_guidance(self, guided: bool) -> None:
        if guided:
            return
        scale = "`guidance_scale` above 1"
        if self.family.guidance_distilled:
            scale = "`true_cfg_scale` above 1 and a `negative_prompt`, '' for example"
        raise GuidanceIsOff(
            f"The method {self.method.name!r} acts on guidance, which is off in this run: give "
            f"{scale}, or take a method that changes the prompt or the noise."
        )


def _at_size(calibration: Calibration | None, shape: tuple[int, ...]) -> Calibration | None:
    """Return the calibration for another size of latents: scores per element stay the same."""
    if calibration is None or calibration.settings["latent_shape"] == list(shape):
        return calibration
    factor = math.sqrt(math.prod(shape) / math.prod(calibration.settings["latent_shape"]))
    return replace(
        calibration,
        settings={**calibration.settings, "latent_shape": list(shape)},
        control_scores=tuple(
            tuple(score * factor for score in scores) for scores in calibration.control_scores
        ),
        threshold=calibration.threshold * factor,
    )
