"""A step of sd-scripts: what its trainers call, and how a prediction is made again."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ...shared.arrays import take_rows
from ...shared.models.families.flux import Flux
from ...shared.patching import Function, HookMissing
from ...shared.score.noise_levels import nearest_timestep, sigma_of
from ...shared.training.layers.regions import still_noise
from ...shared.training.protection import Protection
from ..step import Call, Step
from .data import DISCARDING, BatchSamples, TextSide, with_text, without_text
from .training import Training, network_argument

BATCHED = ("noisy_latents", "timesteps", "text_conds", "batch")
"""Arguments of the U-Net's prediction that hold one row for each sample."""

SHARES = ("AnimaNetworkTrainer",)
"""Trainers whose timesteps go from 0 to 1."""


class StepAdapter:
    """Makes the extra passes of a step; a `TrainerAdapter`.

    SD 1, SD 2 and SDXL noise latents before `call_unet`, so its rows can be predicted again. SD3
    and Flux draw noise and timesteps inside the method that is repeated.
    """

    def __init__(
        self, training: Training, protection: Protection, samples: BatchSamples, text: TextSide,
        lora: nn.Module,
    ):  # fmt: skip
        """Encode the empty prompt, while the text encoders are there.

        Args:
            training: Of SD 1, SD 2, SDXL, SD3 or Flux.
            protection: Fitted already.
            samples: Name the rows of a batch.
            text: The training's text path.
            lora: The trainer's network of LoRA factors.

        Raises:
            HookMissing: The LoRA has to be turned off, and cannot be.
        """
        compares = protection.base_targets or protection.watches or protection.subtraction
        if compares and not hasattr(lora, "set_multiplier"):
            raise HookMissing(
                f"{type(lora).__name__} has no set_multiplier, by which concept subtraction, "
                "project_regions, mem_warn and mem_stop turn the LoRA off."
            )
        samples.show()
        self._training, self._protection, self._samples = training, protection, samples
        self._text, self._empty, self._lora = text, text.encode([""]), lora
        self._signal = _noise_per_velocity(training) if training.has_unet else None
        self._argument = network_argument(type(training.trainer))
        self._trains_text = training.trainer.is_train_text_encoder(training.args)
        self.device, self.repeats_rows = training.accelerator.device, training.has_unet

    def with_step(self, original: Function) -> Function:
        """Wrap the prediction, which comes back without what concepts add to it.

        Weights of the losses go where the trainer reads them later.
        """
        step = self._unet_step if self._training.has_unet else self._flow_step
        return self._in_training(original, step)

    def with_targets(self, original: Function) -> Function:
        """Wrap the method that returns a step's prediction together with its target."""

        def retarget(call: Call) -> tuple:
            step = Step(self._protection, self, call)
            latents = call.given["latents"].clone()  # SD3's trainer may write into them
            prediction, target, *rest = result = call.again()
            timesteps = self._timesteps(result)
            step.call = replace(call, given={**call.given, "latents": latents}, timesteps=timesteps)
            return prediction, step.target(target, latents), *rest

        return self._in_training(original, retarget)

    def _in_training(self, original: Function, step: Callable[[Call], Any]) -> Function:
        """Return a method that makes a step of calls that are learnt from."""
        signature = inspect.signature(original)

        def predict(*args: Any, **kwargs: Any) -> Any:
            call = Call.of(original, signature, args, kwargs)
            # Validation comes here too, and so do the extra passes.
            if not torch.is_grad_enabled() or not call.given.get("is_train", True):
                return original(*args, **kwargs)
            samples = dict(enumerate(self._samples.of(call.given["batch"])))
            call = replace(call, samples=samples, timesteps=call.given.get("timesteps"))
            if self._protection.subtraction:
                call = replace(call, kept=_kept(call))
            return step(call)

        return predict

    def _unet_step(self, call: Call) -> Tensor:
        step = Step(self._protection, self, call)
        step.measure()
        prediction = call.again()
        if self._protection.filter:
            _weigh(call, step.weights(prediction, self._signal))
        return step.subtracted(prediction)

    def _flow_step(self, call: Call) -> tuple:
        """Predict first, since only that draws the timesteps."""
        step = Step(self._protection, self, call)
        with _outputs(call.given[self._argument]) as seen:
            prediction, *rest = result = call.again()
        step.call = replace(call, timesteps=self._timesteps(result))
        step.measure()
        if self._protection.filter:
            _weigh(call, step.weights(seen[0]))
        return step.subtracted(prediction), *rest

    def without_text(self, call: Call, rows: Tensor | None) -> Tensor:
        training = self._training
        empty = self._empty
        if self._trains_text:
            now = self._text.encode_again([""])
            empty = [was if part is None else part for part, was in zip_longest(now, empty)]
        if training.has_unet:
            if rows is not None:
                call = call.only(rows, len(call.given["noisy_latents"]), BATCHED)
            return call.again(text_conds=without_text(call.given["text_conds"], empty))
        padded = type(training.trainer).__name__ in DISCARDING
        text = without_text(call.given["text_encoder_conds"], empty, padded=padded)
        with _outputs(call.given[self._argument]) as seen:
            call.check_timesteps(self._timesteps(self._repeat(call, text_encoder_conds=text)))
        return seen[0]

    def with_text(self, call: Call, rows: Tensor | None) -> Tensor:
        if self._training.has_unet:
            if rows is not None:
                call = call.only(rows, len(call.given["noisy_latents"]), BATCHED)
            return call.again()
        with _outputs(call.given[self._argument]) as seen:
            call.check_timesteps(self._timesteps(self._repeat(call)))
        return seen[0]

    def network(self, call: Call) -> nn.Module:
        return self._training.accelerator.unwrap_model(call.given[self._argument])

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        before = self._lora.multiplier
        self._lora.set_multiplier(0.0)
        try:
            yield
        finally:
            self._lora.set_multiplier(before)

    def base(self, call: Call, rows: Tensor) -> Tensor:
        text = "text_conds" if "text_conds" in call.given else "text_encoder_conds"
        if self._trains_text:
            captions = call.given["batch"]["captions"]
            untrained = with_text(call.given[text], self._text.encode_again(captions))
            call = replace(call, given={**call.given, text: untrained})
        if text == "text_conds":  # of `call_unet`, whose rows are noised already
            return call.only(rows, len(call.given["noisy_latents"]), BATCHED).again()
        result = self._repeat(call)
        call.check_timesteps(self._timesteps(result))
        return result[0][rows]

    def look(self, call: Call, rows: Tensor, latents: Tensor) -> None:
        count = len(call.samples)
        batch, text = (
            take_rows(call.given[name], rows, count) for name in ("batch", "text_encoder_conds")
        )
        text = without_text(text, self._empty)
        sigma = self._protection.base_targets.regions.sigma
        with reading(self._training, call.given, latents, sigma):
            self._repeat(call, latents=latents, batch=batch, text_encoder_conds=text)

    def _timesteps(self, result: tuple) -> Tensor:
        """Return the timesteps of a step, from what its method gives: 0 to 1000."""
        name = type(self._training.trainer).__name__
        return result[2] * (1000 if name in SHARES else 1)

    def _repeat(self, call: Call, **changed: Any) -> tuple:
        """Return what the method of a step gives once more, in the present random state."""
        bare = self.network(call)
        if hasattr(bare, "prepare_block_swap_before_forward"):
            bare.prepare_block_swap_before_forward()
        batch = dict(changed.pop("batch", call.given["batch"]))
        # With these the trainer would predict some samples again, for targets that nobody reads.
        batch.pop("custom_attributes", None)
        return call.again(is_train=False, batch=batch, **changed)


def _kept(call: Call) -> frozenset[int]:
    """Return the rows whose target is the prediction without the LoRA already."""
    attributes = call.given["batch"].get("custom_attributes") or []
    return frozenset(
        row for row, its in enumerate(attributes) if its.get("diff_output_preservation")
    )


def _weigh(call: Call, weights: Tensor) -> None:
    """Put weights where the trainer reads those of the losses, after the prediction."""
    losses = call.given["batch"]["loss_weights"]
    call.given["batch"]["loss_weights"] = losses * weights.to(losses.device, losses.dtype)


def _noise_per_velocity(training: Training) -> Tensor | None:
    """Return sqrt(abar) of every timestep where the network predicts velocity, else None."""
    args = training.args
    if not args.v_parameterization:
        return None
    from diffusers import DDPMScheduler

    # The one schedule of sd-scripts; before v0.10 no method of the trainer gives it.
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    if args.zero_terminal_snr:
        from library.custom_train_functions import fix_noise_scheduler_betas_for_zero_terminal_snr

        fix_noise_scheduler_betas_for_zero_terminal_snr(scheduler)
    return scheduler.alphas_cumprod.sqrt()


@contextmanager
def _outputs(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a network returns: the trainer's prediction may be converted from it."""
    seen: list[Tensor] = []
    handle = network.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def reading(
    training: Training, given: Mapping[str, Any], latents: Tensor, sigma: float
) -> Iterator[None]:
    """Have the network read these latents with still noise, not what the trainer noises.

    Args:
        training: Of SD 1, SD 2, SDXL, SD3 or Flux.
        given: Arguments of the method that makes a step's prediction and target.
        latents: Clean ones, [row channel height width].
        sigma: Noise level, as `Denoiser` counts it.
    """
    noise = still_noise(latents)
    if training.has_unet:
        scheduler = given["noise_scheduler"]
        timestep = nearest_timestep(sigma_of(scheduler.alphas_cumprod), sigma)
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
    else:
        noisy, timestep = (1 - sigma) * latents + sigma * noise, 1000 * sigma

    def swap(_network: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "img" in kwargs:
            return args, kwargs | _for_flux(noisy, timestep, kwargs)
        inputs, timesteps, *text = args
        return (noisy.to(inputs), torch.full_like(timesteps, timestep), *text), kwargs

    given_network = given[network_argument(type(training.trainer))]
    network = training.accelerator.unwrap_model(given_network)
    hook = network.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _for_flux(noisy: Tensor, timestep: float, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Flux reads: patches, timesteps up to 1, and guidance as it was measured with."""
    from library.flux_utils import pack_latents

    changed = {
        "img": pack_latents(noisy).to(kwargs["img"]),
        "timesteps": torch.full_like(kwargs["timesteps"], timestep / 1000),
    }
    if kwargs.get("guidance") is not None:
        changed["guidance"] = torch.full_like(kwargs["guidance"], Flux.guidance_embedding)
    return changed
