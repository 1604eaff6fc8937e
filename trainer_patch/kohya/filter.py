"""The memorization filter in a step of sd-scripts: one more prediction, on the empty prompt."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...shared.arrays import take_rows
from ...shared.training.filter.sample_log import Sample
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from .samples import BatchSamples
from .steps import check_same, repeat
from .text import TextSide, without_text
from .training import Training

Hook = Callable[..., Any]
BATCHED = ("noisy_latents", "timesteps", "text_conds", "batch")
"""Arguments of the U-Net's prediction that hold one row for each sample."""


class StepFilter:
    """Wraps the trainer's prediction and puts the filter's weights where it weighs its losses."""

    def __init__(
        self, training: Training, protection: Protection, samples: BatchSamples, text: TextSide
    ):
        """Encode the empty prompt, while the text encoders are there."""
        samples.show()
        self._training, self._protection, self._samples = training, protection, samples
        self._text, self._known = text, text.encode([""])
        self._scale = _noise_per_velocity(training) if training.has_unet else None

    def wrap(self) -> tuple[str, Hook]:
        """Return the name of the trainer's method to replace and what to replace it by."""
        name = self._training.predicts
        original = getattr(self._training.trainer, name)
        signature = inspect.signature(original)
        step = self._unet_step if self._training.has_unet else self._transformer_step

        def predict(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            # Validation comes here too, without gradient.
            if not torch.is_grad_enabled() or not bound.arguments.get("is_train", True):
                return original(*args, **kwargs)
            return step(run, bound.arguments)

        def run(given: dict[str, Any]) -> Any:
            call = inspect.BoundArguments(signature, given)
            return original(*call.args, **call.kwargs)

        return name, predict

    def _unet_step(self, run: Hook, given: dict[str, Any]) -> Tensor:
        """Predict with SD 1, SD 2 or SDXL, whose inputs are noised already."""
        state, timesteps = RandomState.now(self._training.accelerator.device), given["timesteps"]
        samples = self._samples.of(given["batch"])
        due, plain = self._protection.due(samples, timesteps), None
        if due.any():
            some = given | _rows(given, due)
            # Before the training's own, whose activations would be held beside those made here.
            with aside(state):
                text = without_text(some["text_conds"], self._empty())
                plain = run(some | {"text_conds": text})
        prediction = run(given)
        scale = None if self._scale is None else self._scale[timesteps.cpu().long()]
        self._weigh(given["batch"], prediction, plain, timesteps, samples, scale, state)
        return prediction

    def _transformer_step(self, run: Hook, given: dict[str, Any]) -> tuple:
        """Predict with SD3 or Flux: the call draws noise, which is drawn again."""
        network, batch = given["unet"], given["batch"]
        state = RandomState.now(self._training.accelerator.device)
        samples = self._samples.of(batch)
        with _outputs(network) as seen:
            result = run(given)
            prediction, timesteps = seen[0], result[2]
            del seen[:]
            if self._protection.due(samples, timesteps).any():
                with aside(state):
                    text = without_text(given["text_encoder_conds"], self._empty())
                    repeated = repeat(self._training, run, given, text_encoder_conds=text)
                check_same(timesteps, repeated[2])
            plain = seen[0] if seen else None
        self._weigh(batch, prediction, plain, timesteps, samples, None, state)
        return result

    def _empty(self) -> list[Tensor | None]:
        """Return the conditioning of the empty prompt as it is now."""
        if self._training.trainer.is_train_text_encoder(self._training.args):
            return self._text.encode([""])
        return self._known

    def _weigh(
        self,
        batch: dict[str, Any],
        prediction: Tensor,
        plain: Tensor | None,
        timesteps: Tensor,
        samples: Sequence[Sample],
        scale: Tensor | None,
        before: RandomState,
    ) -> None:
        """Multiply the weights of the losses, which the trainer reads after this."""
        weights = self._protection.weigh(
            prediction,
            prediction[:0].detach() if plain is None else plain,
            timesteps=timesteps,
            samples=samples,
            scale=scale,
            before=before,
        )
        losses = batch["loss_weights"]
        batch["loss_weights"] = losses * weights.to(losses.device, losses.dtype)


def _rows(given: dict[str, Any], due: Tensor) -> dict[str, Any]:
    """Return those arguments of a U-Net's prediction that change when only some rows are due."""
    if due.all():
        return {}
    whole = {name: given[name] for name in BATCHED}
    return take_rows(whole, due.nonzero().flatten(), len(due))


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
def _outputs(network: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a network returns: the trainer's prediction may be converted from it."""
    seen: list[Tensor] = []
    handle = network.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
