"""The concept's regions in a step of sd-scripts: its target there is as predicted without LoRA."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...shared.arrays import take_rows
from ...shared.patching import HookMissing
from ...shared.training.base_targets import BaseTargets
from ...shared.training.layers.regions import Look
from ...shared.training.replay import RandomState, aside
from .samples import BatchSamples
from .steps import Given, Run, check_same, reading, repeat
from .text import TextSide, without_text
from .training import STEP, Training

Hook = Callable[..., Any]


class StepRegions:
    """Wraps the trainer's method that gives a step's prediction together with its target."""

    def __init__(
        self,
        training: Training,
        spared: BaseTargets,
        samples: BatchSamples,
        text: TextSide,
        network: torch.nn.Module,
    ):
        """Encode the empty prompt, while the text encoders are there.

        Args:
            training: Of SD 1, SD 2, SDXL, SD3 or Flux.
            spared: Of the training.
            samples: Who is in a batch.
            text: The training's text path.
            network: The LoRA, which can be turned down to nothing.

        Raises:
            HookMissing: It cannot.
        """
        if not hasattr(network, "set_multiplier"):
            raise HookMissing(
                f"{type(network).__name__} has no set_multiplier, by which project_regions turns "
                "the LoRA off."
            )
        samples.show()
        self._training, self._spared, self._samples = training, spared, samples
        self._empty, self._network = text.encode([""]), network

    def wrap(self) -> tuple[str, Hook]:
        """Return the name of the trainer's method to replace and what to replace it by."""
        original = getattr(self._training.trainer, STEP)
        signature = inspect.signature(original)

        def predict(*args: Any, **kwargs: Any) -> tuple:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            if not given["is_train"]:
                return original(*args, **kwargs)
            state = RandomState.now(self._training.accelerator.device)
            latents = given["latents"].clone()  # SD3's trainer may write into them
            result = original(*args, **kwargs)
            if not (rows := self._spared.naming(self._samples.of(given["batch"]))):
                return result
            prediction, target, timesteps, *rest = result
            given["latents"] = latents

            def base(places: Tensor) -> Tensor:
                with aside(state):  # draws the same noise and timesteps
                    repeated = repeat(self._training, run, given)
                check_same(timesteps, repeated[2])
                return repeated[0][places]

            with aside(state), self._without_lora():
                target = self._spared.target(
                    target, latents, rows, base=base, look=self._look(run, given, rows),
                    network=self._training.accelerator.unwrap_model(given["unet"]),
                )  # fmt: skip
            return prediction, target, timesteps, *rest

        def run(given: Given) -> tuple:
            return original(**given)

        return STEP, predict

    def _look(self, run: Run, given: Given, rows: list[int]) -> Look:
        """Return how the trainer looks at the pictures of some rows."""
        places, count = torch.tensor(rows), len(given["latents"])
        batch, text = (take_rows(given[n], places, count) for n in ("batch", "text_encoder_conds"))
        text = without_text(text, self._empty)

        def look(latents: Tensor) -> None:
            with reading(self._training, given, latents, self._spared.regions.sigma):
                repeat(
                    self._training, run, given, latents=latents, batch=batch,
                    text_encoder_conds=text,
                )  # fmt: skip

        return look

    @contextmanager
    def _without_lora(self) -> Iterator[None]:
        before = self._network.multiplier
        self._network.set_multiplier(0.0)
        try:
            yield
        finally:
            self._network.set_multiplier(before)
