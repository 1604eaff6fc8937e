"""The memorization filter in a step of OneTrainer: one more prediction, on the empty prompt."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...shared.patching import Function, HookMissing, patched
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from .data import BatchSamples, TextSide, looked_at, without_text

WEIGHTS = "loss_weight"
"""Entry of a batch that the trainer multiplies the losses by, after the prediction."""
TIMESTEPS = "_get_timestep_discrete"
"""Method by which the trainer draws the timesteps of a step."""


class StepFilter:
    """Wraps the trainer's prediction and puts the filter's weights into the batch.

    The trainer draws noise and timesteps from the number of the step, so a prediction can be
    repeated.
    """

    def __init__(self, trainer: Any, protection: Protection, samples: BatchSamples, text: TextSide):
        """Encode the empty prompt, while the text encoders are there."""
        self._trainer, self._protection, self._samples = trainer, protection, samples
        self._empty = text.encode([""])

    def wrap(self, original: Function) -> Function:
        """Return what to put in place of the trainer's `predict`."""

        def predict(
            model: Any, batch: dict[str, Any], config: Any, train_progress: Any, **kwargs: Any
        ) -> dict[str, Any]:
            def run(some: dict[str, Any]) -> dict[str, Any]:
                return original(model, some, config, train_progress, **kwargs)

            # Validation and the predictions of the base model come here too, without gradient.
            return self._step(run, batch) if torch.is_grad_enabled() else run(batch)

        return predict

    def _step(self, run: Callable[..., dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
        """Predict, and multiply the weights of the losses, which the trainer reads after this."""
        rows = torch.tensor(looked_at(batch))
        if not len(rows):
            return run(batch)
        given = self._samples.of(batch)
        samples = [given[row] for row in rows]
        before = RandomState.now(self._trainer.train_device)
        with aside(before):
            timesteps = self._timesteps(run, batch)
        plain = None
        if self._protection.due(samples, timesteps[rows]).any():
            # Before the training's own prediction, whose activations a later one would throw away
            # where layers are offloaded. All rows: others would draw other noise.
            with aside(before):
                plain = run(without_text(batch, self._empty))["predicted"][rows]
        output = run(batch)
        if not torch.equal(output["timestep"], timesteps):
            raise HookMissing("A repeated prediction drew other timesteps than the training.")
        prediction = output["predicted"][rows]
        weights = self._protection.weigh(
            prediction,
            prediction[:0].detach() if plain is None else plain,
            timesteps=timesteps[rows],
            samples=samples,
            scale=self._scale(output, timesteps[rows]),
        )
        losses = batch[WEIGHTS].clone()
        losses[rows] *= weights.to(losses.device, losses.dtype)
        batch[WEIGHTS] = losses
        return output

    def _timesteps(self, run: Callable[..., dict[str, Any]], batch: dict[str, Any]) -> Tensor:
        """Return the timesteps that a prediction draws, and do no more of it."""

        def stopping(original: Function) -> Function:
            def draw(*args: Any, **kwargs: Any) -> Tensor:
                raise _Drawn(original(*args, **kwargs))

            return draw

        try:
            with patched(self._trainer.model_setup, TIMESTEPS, stopping):
                run(batch)
        except _Drawn as drawn:
            return drawn.timesteps
        raise HookMissing(f"The prediction draws no timesteps with `{TIMESTEPS}`.")

    def _scale(self, output: dict[str, Any], timesteps: Tensor) -> Tensor | None:
        """Return sqrt(abar), which makes noise of velocity; None where scores need no factor."""
        if output.get("prediction_type") != "v_prediction":
            return None
        signal = self._trainer.model.noise_scheduler.alphas_cumprod.sqrt()
        return signal.cpu()[timesteps.cpu().long()]


class _Drawn(Exception):
    """Carries timesteps out of a prediction that has drawn them."""

    def __init__(self, timesteps: Tensor):
        super().__init__()
        self.timesteps = timesteps
