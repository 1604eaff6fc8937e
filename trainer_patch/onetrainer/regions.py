"""The concept's regions in a step of OneTrainer: its target there is as predicted without LoRA."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...shared.arrays import take_rows
from ...shared.models.families.flux import Flux
from ...shared.patching import Function, HookMissing, patched
from ...shared.score.noise_levels import nearest_timestep, sigma_of
from ...shared.training.base_targets import BaseTargets
from ...shared.training.layers.regions import Look, still_noise
from ...shared.training.replay import RandomState, aside
from .config import has_unet
from .data import BatchSamples, TextSide, looked_at, without_text
from .filter import TIMESTEPS

NOISING = "_add_noise_discrete"
"""Method by which the trainer adds noise to clean latents, in the network's scale."""
WITHOUT_LORA = "prior_model"
"""Method that gives a context without the LoRA, for images of the kind prior prediction."""

Batch = dict[str, Any]
Run = Callable[..., dict[str, Any]]
"""The trainer's `predict` on a batch, with everything else as in the step."""


class StepRegions:
    """Wraps the trainer's prediction, which comes together with its target.

    The trainer draws noise and timesteps from the number of the step, so a prediction can be
    repeated.
    """

    def __init__(self, trainer: Any, spared: BaseTargets, samples: BatchSamples, text: TextSide):
        """Encode the empty prompt, while the text encoders are there.

        Args:
            trainer: Of SD 1, SD 2, SDXL, SD3 or Flux.
            spared: Of the training.
            samples: Who is in a batch.
            text: The trainer's text path.
        """
        self._trainer, self._spared, self._samples = trainer, spared, samples
        self._empty = text.encode([""])

    def wrap(self, original: Function) -> Function:
        """Return what to put in place of the trainer's `predict`."""

        def predict(
            model: Any, batch: Batch, config: Any, train_progress: Any, **kwargs: Any
        ) -> dict[str, Any]:
            def run(some: Batch, **changed: Any) -> dict[str, Any]:
                return original(model, some, config, train_progress, **kwargs | changed)

            # Validation and the predictions of the base model come here too, without gradient.
            return self._step(run, batch) if torch.is_grad_enabled() else run(batch)

        return predict

    def _step(self, run: Run, batch: Batch) -> dict[str, Any]:
        """Predict, and change the target that comes with it, which the trainer reads after this."""
        places = looked_at(batch)
        samples = self._samples.of(batch)
        named = self._spared.naming([samples[place] for place in places])
        if not named:
            return run(batch)
        rows = [places[row] for row in named]
        before = RandomState.now(self._trainer.train_device)
        output, latents = self._noised(run, batch)

        def base(places: Tensor) -> Tensor:
            with aside(before):
                repeated = run(batch)
            if not torch.equal(repeated["timestep"], output["timestep"]):
                raise HookMissing("A repeated prediction drew other timesteps than the training.")
            return repeated["predicted"][places]

        setup, model = self._trainer.model_setup, self._trainer.model
        with aside(before), getattr(setup, WITHOUT_LORA)(model, self._trainer.config):
            target = self._spared.target(
                output["target"], latents, rows,
                network=self._network, look=self._look(run, batch, rows), base=base,
            )  # fmt: skip
        return output | {"target": target}

    def _noised(self, run: Run, batch: Batch) -> tuple[dict[str, Any], Tensor]:
        """Return the prediction, and the clean latents to which it adds noise."""
        seen: list[Tensor] = []

        def seeing(original: Function) -> Function:
            def add(latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                seen.append(latents.detach())
                return original(latents, *args, **kwargs)

            return add

        with patched(self._trainer.model_setup, NOISING, seeing):
            output = run(batch)
        if len(seen) != 1 or seen[0].shape != output["target"].shape:
            raise HookMissing(f"The prediction does not add its noise with `{NOISING}`.")
        return output, seen[0]

    @property
    def _network(self) -> nn.Module:
        model = self._trainer.model
        return model.unet if has_unet(self._trainer.config) else model.transformer

    def _nearest(self) -> int:
        """Return the timestep of the noise at which pictures are looked at."""
        sigma, scheduler = self._spared.regions.sigma, self._trainer.model.noise_scheduler
        if not has_unet(self._trainer.config):
            return round(1000 * sigma) - 1  # the trainer's first has a noise of 1/1000
        return nearest_timestep(sigma_of(scheduler.alphas_cumprod), sigma)

    def _look(self, run: Run, batch: Batch, rows: list[int]) -> Look:
        """Return how the trainer looks at the pictures of some rows."""
        count = len(batch["image_path"])
        some = take_rows(without_text(batch, self._empty), torch.tensor(rows), count)
        setup, nearest = self._trainer.model_setup, self._nearest()

        def look(latents: Tensor) -> None:
            def draw(_original: Function) -> Function:
                def drawn(*_args: Any, **_kwargs: Any) -> Tensor:
                    return torch.full((len(latents),), nearest, device=latents.device)

                return drawn

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
                hook = self._network.register_forward_pre_hook(guided, with_kwargs=True)
                undo.callback(hook.remove)
                undo.enter_context(patched(setup, TIMESTEPS, draw))
                undo.enter_context(patched(setup, NOISING, still))
                run(some, deterministic=True)  # no caption is dropped

        return look
