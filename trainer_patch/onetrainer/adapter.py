"""A step of OneTrainer: its prediction comes with the target, and can be made again.

The trainer draws noise and timesteps from the number of the step, so a repeated prediction has the
same ones, but only for the whole batch.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...shared.models.families.flux import Flux
from ...shared.patching import Function, HookMissing, patched
from ...shared.score.noise_levels import nearest_timestep, sigma_of
from ...shared.training.layers.regions import still_noise
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from ..step import Call, Step
from .checks import NOISING, TIMESTEPS, WEIGHTS, WITHOUT_LORA, has_unet
from .data import BatchSamples, TextSide, learnt_rows, without_text


class StepAdapter:
    """Makes the extra passes of a step; a `TrainerAdapter`."""

    repeats_rows = False

    def __init__(self, trainer: Any, protection: Protection, samples: BatchSamples, text: TextSide):
        """Encode the empty prompt, while the text encoders are there.

        Args:
            trainer: Of SD 1, SD 2, SDXL, SD3 or Flux.
            protection: Fitted already.
            samples: Name the rows of a batch.
            text: The trainer's text path.
        """
        self._trainer, self._protection, self._samples = trainer, protection, samples
        self._empty = text.encode([""])
        self.device: torch.device = trainer.train_device

    def protected(self, original: Function) -> Function:
        """Wrap the trainer's `predict`."""

        def predict(
            model: Any, batch: dict[str, Any], config: Any, train_progress: Any, **kwargs: Any
        ) -> dict[str, Any]:
            def run(batch: dict[str, Any], **changed: Any) -> dict[str, Any]:
                return original(model, batch, config, train_progress, **kwargs | changed)

            # Validation and the predictions of the base model come here too, without gradient.
            if not torch.is_grad_enabled():
                return run(batch)
            rows = learnt_rows(batch)
            if not rows:
                self._protection.pass_by()
                return run(batch)
            known = self._samples.of(batch)
            samples = {row: known[row] for row in rows}
            return self._step(Call(run=run, given={"batch": batch}, samples=samples))

        return predict

    def _step(self, call: Call) -> dict[str, Any]:
        """Predict; change weights, prediction and target, which the trainer reads after this."""
        protection, batch = self._protection, call.given["batch"]
        step = Step(protection, self, call)
        if protection.filter or protection.subtraction:
            with aside(RandomState.now(self.device)):
                timesteps = self._timesteps(call)
            step.call = call = replace(call, timesteps=timesteps)
        # Where layers are offloaded, a pass after the training's own would discard what that holds
        # for the gradient.
        step.measure()
        clean: list[Tensor] = []
        with ExitStack() as undo:
            if protection.base_targets:
                undo.enter_context(self._replaced(NOISING, partial(_keeping, clean=clean)))
            output = call.again()
        if protection.filter:
            call.check_timesteps(output["timestep"])
            weights = step.weights(output["predicted"], self._signal(output))
            losses = batch[WEIGHTS]
            batch[WEIGHTS] = losses * weights.to(losses.device, losses.dtype)
        if protection.subtraction:
            output = output | {"predicted": step.subtracted(output["predicted"])}
        if protection.base_targets:
            if len(clean) != 1 or clean[0].shape != output["target"].shape:
                raise HookMissing(f"The prediction does not add its noise with `{NOISING}`.")
            step.call = replace(call, timesteps=output["timestep"])
            output = output | {"target": step.target(output["target"], clean[0])}
        return output

    def without_text(self, call: Call, rows: Tensor | None) -> Tensor:
        return call.again(batch=without_text(call.given["batch"], self._empty))["predicted"]

    def with_text(self, call: Call, rows: Tensor | None) -> Tensor:
        return call.again()["predicted"]

    def network(self, call: Call | None = None) -> nn.Module:
        model = self._trainer.model
        return model.unet if has_unet(self._trainer.config) else model.transformer

    def without_lora(self) -> AbstractContextManager:
        """Return the block that the trainer itself predicts in for images of prior prediction."""
        setup, model = self._trainer.model_setup, self._trainer.model
        return getattr(setup, WITHOUT_LORA)(model, self._trainer.config)

    def base(self, call: Call, rows: Tensor) -> Tensor:
        output = call.again()
        call.check_timesteps(output["timestep"])
        return output["predicted"][rows]

    def look(self, call: Call, rows: Tensor, latents: Tensor) -> None:
        count = len(call.given["batch"]["image_path"])
        some = replace(call, given={"batch": without_text(call.given["batch"], self._empty)})
        nearest = self._nearest()

        def draw(_original: Function) -> Function:
            return lambda *_, **__: torch.full((len(latents),), nearest, device=latents.device)

        def still(original: Function) -> Function:
            def add(_latents: Tensor, _noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                return original(latents, still_noise(latents), *args, **kwargs)

            return add

        def guided(_network: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if kwargs.get("guidance") is None:
                return args, kwargs
            guidance = torch.full_like(kwargs["guidance"], Flux.guidance_embedding)
            return args, kwargs | {"guidance": guidance}

        with ExitStack() as undo:
            hook = self.network().register_forward_pre_hook(guided, with_kwargs=True)
            undo.callback(hook.remove)
            undo.enter_context(self._replaced(TIMESTEPS, draw))
            undo.enter_context(self._replaced(NOISING, still))
            some.only(rows, count).again(deterministic=True)  # no caption is dropped

    def _nearest(self) -> int:
        """Return the timestep with the noise level of the regions."""
        sigma = self._protection.base_targets.regions.sigma
        if not has_unet(self._trainer.config):
            return round(1000 * sigma) - 1  # the trainer's first has a noise of 1/1000
        return nearest_timestep(sigma_of(self._trainer.model.noise_scheduler.alphas_cumprod), sigma)

    def _timesteps(self, call: Call) -> Tensor:
        """Return the timesteps that a prediction draws, and do no more of it."""

        def stopping(original: Function) -> Function:
            def draw(*args: Any, **kwargs: Any) -> Tensor:
                raise _Drawn(original(*args, **kwargs))

            return draw

        try:
            with self._replaced(TIMESTEPS, stopping):
                call.again()
        except _Drawn as drawn:
            return drawn.timesteps
        raise HookMissing(f"The prediction draws no timesteps with `{TIMESTEPS}`.")

    def _signal(self, output: dict[str, Any]) -> Tensor | None:
        """Return sqrt(abar), which makes noise of velocity; None where scores need no factor."""
        if output.get("prediction_type") != "v_prediction":
            return None
        return self._trainer.model.noise_scheduler.alphas_cumprod.sqrt().cpu()

    def _replaced(
        self, name: str, wrap: Callable[[Function], Function]
    ) -> AbstractContextManager[None]:
        """Return a block in which a method of the trainer's model setup is another one."""
        return patched(self._trainer.model_setup, name, wrap)


def _keeping(original: Function, clean: list[Tensor]) -> Function:
    """Return a function that adds noise and keeps the clean latents it is called with."""

    def add(latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        clean.append(latents.detach())
        return original(latents, *args, **kwargs)

    return add


class _Drawn(Exception):
    """Carries timesteps out of a prediction that has drawn them."""

    def __init__(self, timesteps: Tensor):
        super().__init__()
        self.timesteps = timesteps
