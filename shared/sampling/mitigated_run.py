"""One call of a pipeline with a method at work on some of its images."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..mitigation.gate import AppliedGate
from ..mitigation.method import Method, Mitigation, Start, Step
from ..models.adapter import PipelineDenoiser
from ..models.calls.hold import unfollowed
from ..models.calls.network_call import NetworkCall, written
from ..patching import patched
from ..score.calibration import Calibration
from ..score.denoiser import Conditioning
from ..score.metrics import text_noise_norm
from ..score.noise_levels import noise_per_velocity, output_from_x0, x0_from_output
from .follower import Follower, argument_of


class MitigatedRun:
    """Changes the rows of some images in what a network reads and answers, and no others.

    A batch holds the rows of the negatives, then those of the prompts; the network reads the rows
    of the prompts alone where guidance is off, and both one after the other where it is `separate`.
    """

    def __init__(
        self, denoiser: PipelineDenoiser, *, images: int, fired: Sequence[int], separate: bool,
        follower: Follower,
    ):  # fmt: skip
        """Prepare a run.

        Args:
            denoiser: The pipeline's, at the size of the run.
            images: In the batch.
            fired: Which of them the method acts on.
            separate: The network is called for the prompts first, then for the negatives.
            follower: Of the running call.
        """
        self.denoiser, self.family, self.pipeline = denoiser, denoiser.family, denoiser.pipeline
        self.images, self.fired, self.separate = images, list(fired), separate
        self.follower = follower
        self.mitigation = Mitigation()
        self._undo = ExitStack()
        self._moved: list[int] = []
        self._noise: Tensor | None = None  # [moved *latent] as the network reads it
        self._waiting: tuple[NetworkCall, Any] | None = None
        self._written: Tensor | None = None  # the method's prediction at the last guided call
        self._index = 0

    def start(
        self,
        method: Method,
        call: NetworkCall,
        *,
        sigma: Tensor,
        empty: Conditioning,
        prompts: tuple[str, ...],
        seed: int,
        calibration: Calibration | None,
        gate: AppliedGate,
    ) -> Start:
        """Let the method act on the first call, and return the start that it was given.

        Raises:
            ValueError: The method refuses, or its answer does not fit the run.
        """
        cond_at, _ = self._at(call)
        assert cond_at is not None  # the first call of a run reads the prompts
        rows = [cond_at + image for image in self.fired]
        latent, read = self._units_of_noise(call)
        scale = self.denoiser.schedule.latent_scale(float(sigma))
        # Autograd refuses inference tensors; indexing copies, and a copy made here is none.
        with unfollowed(), torch.inference_mode(False), torch.no_grad():
            x = self.family.unpack(call.latents[rows]).float() / read * scale
            start = Start(
                denoiser=self.denoiser,
                cond=call.conditioning(rows),
                x=x,
                sigma=sigma.clone(),
                x0_uncond=self.denoiser.denoise(x, sigma, empty[[0] * len(rows)]),
                generator=torch.Generator("cpu").manual_seed(seed),
                prompts=prompts,
                calibration=calibration,
                network=self.family.network,
                noises=gate.noises(),
                score=gate.scores if calibration is not None else None,
                # Each prompt of these is encoded at its own length, and a call reads one length.
                any_length=call.any_length
                or (self.family.one_by_one and len(self.fired) == len(call.latents)),
            )
            with torch.enable_grad():
                self.mitigation = method.start(start)
            _check(method, self.mitigation, start)
            if self.mitigation.x is not None:
                noise = self.mitigation.x.detach() / scale
                self._replace_noise(noise, (self.mitigation.x != x).flatten(1).any(1), latent, read)
        return start

    def close(self) -> None:
        """Undo everything that reaches beyond this object."""
        try:
            self.mitigation.close()
        finally:
            self._undo.close()

    def prepare(self, call: NetworkCall) -> NetworkCall:
        """Return the call with what the method replaced."""
        cond_at, uncond_at = self._at(call)
        if self._noise is not None:
            for at in (cond_at, uncond_at):
                if at is not None:
                    call = call.with_latents([at + image for image in self._moved], self._noise)
        if cond_at is not None and (cond := self.mitigation.cond) is not None:
            call = call.with_conditioning([cond_at + image for image in self.fired], cond)
        return call

    def answer(self, network: Callable[..., Any], call: NetworkCall, output: Any) -> Any:
        """Return the output with the method's guidance in it, or None when it has none.

        It stands in the rows of the prompt and of the negative alike: whatever the scale, the
        pipeline's uncond + scale * (cond - uncond) then is the method's own prediction.
        """
        cond_at, uncond_at = self._at(call)
        prediction = self.family.prediction(output, call.latents)
        if call.kwargs.get("skip_layers"):
            # SD3 adds (cond - this) * scale; in the rows of the method both are the same.
            if self._written is None:
                return None
            return self.family.answered(output, call.latents, self.fired, self._written)
        if self.separate and uncond_at is None:
            self._waiting = call, output
            return None
        self._written, waiting, self._waiting = None, self._waiting, None
        if uncond_at is None or type(self.mitigation).guide is Mitigation.guide:
            return None
        rows = [uncond_at + image for image in self.fired]
        if waiting is not None:
            conditional, own = waiting[0].only(self.fired), waiting[1]
            cond = self.family.prediction(own, call.latents)
            guided = self._guide(network, conditional, cond[self.fired], prediction[rows])
            if guided is not None:
                # The pipeline holds this very tensor and combines it with what is returned now.
                self.family.overwrite(own, self.fired, guided)
        else:
            assert cond_at is not None  # one call reads both
            of_cond = [cond_at + image for image in self.fired]
            guided = self._guide(network, call.only(of_cond), prediction[of_cond], prediction[rows])
            rows, guided = rows + of_cond, None if guided is None else torch.cat([guided, guided])
        if guided is None:
            return None
        self._written = guided[: len(self.fired)]
        return self.family.answered(output, call.latents, rows, guided)

    def _guide(
        self, network: Callable[..., Any], call: NetworkCall, cond: Tensor, uncond: Tensor
    ) -> Tensor | None:
        """Return the method's prediction in the network's shape, one row per fired image."""
        schedule, parametrization = self.denoiser.schedule, self.denoiser.parametrization
        timestep = self.family.training_timestep(float(call.time))
        sigma = schedule.sigma(timestep)
        with unfollowed(), torch.inference_mode(False), torch.no_grad():
            tensors = (call.latents, cond, uncond)  # cloned: autograd refuses inference tensors
            read, cond, uncond = (self.family.unpack(t).clone() for t in tensors)
            x = read.float() * schedule.latent_scale(sigma)
            unit = noise_per_velocity(sigma) if parametrization == "v_prediction" else 1.0
            step = Step(
                index=self._index,
                percent=schedule.percent(timestep),
                x=read,
                cond=cond,
                uncond=uncond,
                cond_scale=self._cond_scale(),
                magnitude=text_noise_norm(cond, uncond) * unit,
                predict=lambda cond=None: self._predict(network, call, cond),
                to_x0=lambda prediction: x0_from_output(
                    parametrization, x, sigma, prediction.float()
                ),
                from_x0=lambda x0: output_from_x0(parametrization, x, sigma, x0.float()),
            )
            guided = self.mitigation.guide(step)
            self._index += 1
            if guided is None:
                return None
            if guided.shape != cond.shape:
                raise ValueError(_misfit("a guided prediction", guided, cond))
            return self.family.pack(guided)

    def _predict(
        self, network: Callable[..., Any], call: NetworkCall, cond: Conditioning | None
    ) -> Tensor:
        """Return one more prediction for the rows of `call`, from other text if it is given."""
        if cond is not None:
            call = call.with_conditioning(range(len(call.latents)), cond)
        output = network(*call.args, **call.kwargs)
        return self.family.unpack(self.family.prediction(output, call.latents))

    def _at(self, call: NetworkCall) -> tuple[int | None, int | None]:
        """Return where the rows of the prompts and of the negatives begin; None: not in there."""
        if self.separate:
            return (0, None) if self._waiting is None else (None, 0)
        if call.kwargs.get("skip_layers"):
            return 0, None
        if self.family.guidance.calls == 1 and self.follower.guided():
            return (0, self.images) if self.family.guidance.prompt_first else (self.images, 0)
        return 0, None

    def _cond_scale(self) -> float:
        guidance = self.family.guidance
        known = getattr(self.pipeline, guidance.scale, None)
        if known is None:
            known = argument_of(self.pipeline, guidance.scale)
        return float(known) + guidance.offset

    def _units_of_noise(self, call: NetworkCall) -> tuple[float, float]:
        """Return what noise of std 1 is at the start, as it is kept and as it is read."""
        scheduler = self.pipeline.scheduler
        if self.denoiser.parametrization == "flow":
            return 1.0, 1.0
        latent = float(scheduler.init_noise_sigma)
        return latent, float(scheduler.scale_model_input(torch.tensor(latent), float(call.time)))

    def _replace_noise(self, noise: Tensor, changed: Tensor, latent: float, read: float) -> None:
        """Let the network read other noise until the first step, which then starts from it."""
        places = changed.nonzero().flatten().tolist()
        if not places:
            return
        self._moved = [self.fired[place] for place in places]
        self._noise = self.family.pack(noise[places] * read)
        kept = noise[places] * latent
        if self.family.packed:  # as the scheduler keeps it
            kept = self.family.pack(kept)

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def step(
                model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
            ) -> Any:
                self._noise = None
                self._undo.close()
                sample = written(sample, self._moved, kept.to(sample))
                return original(model_output, timestep, sample, *args, **kwargs)

            return step

        self._undo.enter_context(patched(self.pipeline.scheduler, "step", wrap))


def _check(method: Method, mitigation: Mitigation, start: Start) -> None:
    """Raise ValueError unless what the method replaces has the shape of the run."""
    pairs = [("noise", mitigation.x, start.x)]
    if mitigation.cond is not None:
        expected = start.cond.embeddings
        if start.any_length:  # as many tokens as there are
            expected = expected[:, :1].expand(-1, mitigation.cond.embeddings.shape[1], -1)
        pairs += [
            ("embeddings", mitigation.cond.embeddings, expected),
            ("pooled text", mitigation.cond.pooled, start.cond.pooled),
        ]
    for what, given, expected in pairs:
        if given is not None and (expected is None or given.shape != expected.shape):
            raise ValueError(_misfit(f"{what} by {method.name!r}", given, expected))


def _misfit(what: str, given: Tensor, expected: Tensor | None) -> str:
    shape = "none" if expected is None else f"{tuple(expected.shape)}, the shape of the run"
    return f"Found {what} of shape {tuple(given.shape)}, expected {shape}."
