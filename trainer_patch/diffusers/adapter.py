"""A step with diffusers and PEFT: hooks around the network's own forward pass.

Whatever loss a script computes from the prediction, no gradient reaches it from samples that the
filter leaves out; the prediction keeps its value, so the loss that is shown keeps its meaning.
Concept subtraction moves the prediction by what the target should lose.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...shared.models.adapter import PipelineDenoiser
from ...shared.models.lora.attach import lora_disabled
from ...shared.patching import Function, patched
from ...shared.training.base_weights import BaseWeights
from ...shared.training.filter.filter import scale_gradient
from ...shared.training.filter.sample_log import Sample
from ...shared.training.layers.regions import looking
from ...shared.training.projection.factors import UnsupportedTraining
from ...shared.training.protection import Protection
from ..step import Call, Step
from .data import TEXT, EmptyPrompt, text_encoders, with_text

REMEMBERED = 512
"""Captions whose untrained text is kept, where text encoders are trained."""

Samples = Callable[[], Sequence[Sample]]
"""Returns the samples in the batch of the forward pass that runs now; empty where unknown."""


class StepAdapter:
    """Makes the extra passes of a step, between hooks of the network; a `TrainerAdapter`."""

    repeats_rows = True

    def __init__(
        self,
        network: nn.Module,
        protection: Protection,
        empty: EmptyPrompt | None,
        samples: Samples,
        *,
        denoiser: PipelineDenoiser | None = None,
        prior_preservation: bool = False,
        trains_text: bool = False,
        trained: Iterable[Tensor] = (),
    ):
        """Set up, while the text encoders are there; `attached` puts the hooks on.

        Args:
            network: Of diffusers, that carries the LoRA.
            protection: Fitted already.
            empty: In place of the prompts; the filter needs it.
            samples: Called in each step.
            denoiser: Of the same model, needed for base targets, controls and where text encoders
                are trained.
            prior_preservation: The second half of each batch are class images that the model
                made itself; they are neither measured nor left out.
            trains_text: Text encoders are trained, so the text of a step is no more the base
                model's.
            trained: What the optimizers train.
        """
        self._network, self._protection, self._empty = network, protection, empty
        self._samples, self._denoiser = samples, denoiser
        self._halves = 2 if prior_preservation else 1
        self._trains_text = trains_text
        self._untrained = lru_cache(REMEMBERED)(self._encode)
        if protection.subtraction:
            parts = [network, *(text_encoders(denoiser.pipeline) if trains_text else ())]
            self._weights = BaseWeights(parts, trained)
        if protection.base_targets:
            self._look = looking(denoiser, protection.base_targets.regions.sigma)
        forward = inspect.signature(type(network).forward)
        self._signature = forward.replace(parameters=list(forward.parameters.values())[1:])
        self._step: Step | None = None

    @property
    def device(self) -> torch.device:
        """The network's."""
        return self._network.device

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Take part in every forward pass with gradient, for as long as the block lasts."""
        before = self._network.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self._network.register_forward_hook(self._after)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self._step = None

    def target(
        self, target: Tensor, latents: Tensor, samples: Sequence[Sample], *, others: int = 0
    ) -> Tensor:
        """Return the target of the step whose prediction was made last.

        Args:
            target: [sample channel height width].
            latents: Clean ones, in the network's scale, of the same shape.
            samples: Those of the step, with captions where the concept has names.
            others: Rows behind those of the samples, which are left alone.

        Raises:
            UnsupportedTraining: The shapes differ, or it is not known which samples name the
                concept, or of which prediction it is the target.
        """
        if target.shape != latents.shape:
            raise UnsupportedTraining(
                f"The target {tuple(target.shape)} must have the shape of the latents, "
                f"{tuple(latents.shape)}; packed ones, as Flux', are not covered."
            )
        if len(samples) + others != len(target) or (
            self._protection.base_targets.names and not all(sample.caption for sample in samples)
        ):
            raise UnsupportedTraining(
                "Which images name the concept is not known: in one's own loop set "
                "`loop.samples` in each step to a Sample(file=..., caption=...) for each row of "
                "the target; a script's loader must give one caption for each image."
            )
        if self._step is None:
            raise UnsupportedTraining("Call `loop.target` after the network's prediction.")
        self._step.call = replace(self._step.call, samples=dict(enumerate(samples)))
        return self._step.target(target, latents)

    def without_text(self, call: Call, rows: Tensor | None) -> Tensor:
        some = call if rows is None else call.only(rows, _rows(call))
        return some.run(**self._empty.in_place_of_prompt(some.given))[0]

    def with_text(self, call: Call, rows: Tensor | None) -> Tensor:
        return (call if rows is None else call.only(rows, _rows(call))).again()[0]

    def network(self, call: Call) -> nn.Module:
        return self._network

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        with ExitStack() as undo:
            # Behind the launcher the denoiser's network may be an outline.
            undo.enter_context(lora_disabled(self._network))
            if self._denoiser is not None:
                undo.enter_context(self._denoiser.lora_disabled())
            if self._protection.subtraction:
                undo.enter_context(self._weights.in_place())
            yield

    def base(self, call: Call, rows: Tensor) -> Tensor:
        some = call.only(rows, _rows(call))
        if not self._trains_text:
            return some.again()[0]
        captions = [call.samples[int(row)].caption for row in rows]
        if not all(captions):
            raise UnsupportedTraining(
                "Where text encoders are trained, concept subtraction needs the caption of each "
                "sample: set `loop.samples` in each step to Sample(file=..., caption=...)."
            )
        texts, pooled = zip(*map(self._untrained, captions), strict=True)
        joined = None if pooled[0] is None else torch.cat(pooled)
        return some.run(**with_text(some.given, torch.cat(texts), joined))[0]

    def _encode(self, caption: str) -> tuple[Tensor, Tensor | None]:
        """Return a caption's text as the untrained encoders make it; called without the LoRA."""
        cond = self._denoiser.encode([caption])
        return cond.embeddings.detach(), None if cond.pooled is None else cond.pooled.detach()

    def look(self, call: Call, rows: Tensor, latents: Tensor) -> None:
        self._look(latents)

    def _before(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        """Begin a step, before the training's own pass."""
        if not torch.is_grad_enabled():
            return  # sampling for validation, and the extra passes
        # Not `network` itself, which would come back to these hooks.
        call = Call.of(network.forward, self._signature, args, kwargs)
        if self._protection.filter or self._protection.subtraction:
            rows = _rows(call) // self._halves
            known = self._named(call.given.get(TEXT), rows)
            call = replace(call, samples=dict(enumerate(known)))
        if self._protection.filter:
            call = replace(call, timesteps=self._empty.timesteps(call.given, _rows(call)))
        self._step = Step(self._protection, self, call)
        self._step.measure()

    def _after(self, network: nn.Module, args: tuple, output: Any) -> Any:
        """Return the output with what the loss should see; None leaves it as it is."""
        prediction = output[0]
        if not (torch.is_grad_enabled() and prediction.requires_grad):
            return None
        step, made = self._step, prediction
        if self._protection.filter:
            made = scale_gradient(made, step.weights(prediction, self._empty.signal))
        made = step.subtracted(made)
        if not self._protection.base_targets:
            self._step = None
        return with_prediction(output, made)

    def _named(self, text: Tensor | None, rows: int) -> Sequence[Sample]:
        """Return the samples of the batch, by the text alone where nothing else is known."""
        known = self._samples()
        if known and len(known) != rows:
            raise UnsupportedTraining(
                f"The network is called with {rows} samples, the batch holds {len(known)}."
            )
        if not known and text is None:
            raise UnsupportedTraining(
                "Which samples a batch holds is not known: set `loop.samples` in each step."
            )
        # One row of text may stand for all.
        return known or [Sample(file=f"text {_hash(text[row % len(text)])}") for row in range(rows)]


def _rows(call: Call) -> int:
    """Return the rows of the batch: of the first argument, the noisy latents."""
    return len(next(iter(call.given.values())))


def _hash(text: Tensor) -> str:
    """Return twelve digits that distinguish one encoded caption from another."""
    content = text.detach().float().cpu().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:12]


def with_prediction(output: Any, prediction: Tensor) -> Any:
    """Return a network's output with another prediction; None, for a hook, if it is the same."""
    if prediction is output[0]:
        return None
    return (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(prediction)


@dataclass(frozen=True, kw_only=True)
class Noising:
    """What a script noised last."""

    scheduler: Any
    latents: Tensor
    """Clean ones, [sample channel height width]."""
    noise: Tensor
    timesteps: Tensor
    noisy: Tensor

    def target(self) -> Tensor:
        """Return what a network is taught that predicts as the scheduler's configuration says."""
        predicted = self.scheduler.config.prediction_type
        if predicted == "epsilon":
            return self.noise
        if predicted == "v_prediction":
            return self.scheduler.get_velocity(self.latents, self.noise, self.timesteps)
        raise UnsupportedTraining(f"project_regions does not know the target of {predicted!r}.")


class MovedPredictions:
    """Base targets in a script, which computes its target alone: each prediction is moved.

    A loss of prediction - target is the same when the prediction gains what the target should lose,
    however a script weighs samples and timesteps.
    """

    def __init__(
        self,
        network: nn.Module,
        target: Callable[..., Tensor],
        samples: Samples,
        *,
        prior_preservation: bool = False,
    ):
        """Set up; `attached` puts the hooks on.

        Args:
            network: A U-Net, that is trained.
            target: `StepAdapter.target` of the same network.
            samples: Called in each step.
            prior_preservation: The second half of each batch are class images; they are left alone.
        """
        self._network, self._target, self._samples = network, target, samples
        self._halves = 2 if prior_preservation else 1
        self._noising: Noising | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Move the predictions of every forward pass with gradient, for as long as it lasts.

        After the filter's hooks, which measure predictions as they are.

        Raises:
            HookMissing: The installed scheduler does not noise as expected.
        """
        from diffusers import DDPMScheduler

        with ExitStack() as undo:
            undo.enter_context(patched(DDPMScheduler, "add_noise", self._remember))
            undo.callback(self._network.register_forward_hook(self._move, with_kwargs=True).remove)
            yield

    def _remember(self, original: Function) -> Function:
        def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            noisy = original(scheduler, latents, noise, timesteps)
            self._noising = Noising(
                scheduler=scheduler, latents=latents, noise=noise, timesteps=timesteps, noisy=noisy
            )
            return noisy

        return add_noise

    def _move(self, network: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Return the output with its prediction moved; None leaves it as it is."""
        prediction = output[0]
        if not (torch.is_grad_enabled() and prediction.requires_grad):
            return None  # sampling for validation, and the extra passes
        noising, self._noising = self._noising, None
        given = args[0] if args else kwargs["sample"]
        if noising is None or not torch.equal(given, noising.noisy.to(given)):
            raise UnsupportedTraining(
                "The network was given other latents than DDPMScheduler.add_noise made last: "
                "project_regions does not know the target of this script. Leave it out."
            )
        target = noising.target().float()
        others = len(target) - len(target) // self._halves
        based = self._target(target, noising.latents, self._samples(), others=others)
        if based is target:
            return None
        # In this order a LoRA that does nothing yet has a loss of exactly 0 in the regions.
        moved = torch.where(based == target, prediction, target + (prediction - based))
        return with_prediction(output, moved)
