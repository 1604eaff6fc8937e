"""The concept's regions in a step of ai-toolkit: what is taught there is as predicted without LoRA.

For networks that predict noise: the noise that the trainer's loss is given is the target.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...shared.arrays import take_rows
from ...shared.patching import HookMissing
from ...shared.score.noise_levels import nearest_timestep, sigma_of
from ...shared.training.base_targets import BaseTargets
from ...shared.training.layers.regions import Look, still_noise
from ...shared.training.replay import RandomState, aside
from .samples import samples_of

Run = Callable[..., Tensor]
"""The trainer's `predict_noise`."""


class StepRegions:
    """Remembers the prediction that is learnt from, and repeats it with the LoRA off."""

    def __init__(self, process: Any, spared: BaseTargets):
        """Encode the empty prompt, while the text encoders are there.

        Args:
            process: The training, with its network.
            spared: Of the training.
        """
        self._process, self._spared = process, spared
        self._empty = process.sd.encode_prompt([""]).detach()
        self._call: tuple[Run, dict[str, Any], RandomState] | None = None

    def remember(self, run: Run, given: dict[str, Any]) -> None:
        """Take the arguments of a step's prediction, before it is made."""
        self._call = run, given, RandomState.now(given["timesteps"].device)

    def noise(self, given: dict[str, Any]) -> Tensor:
        """Return the noise to compute a step's loss with.

        Args:
            given: Arguments of the trainer's `calculate_loss`.

        Raises:
            HookMissing: The loss is of another prediction than the one before it.
        """
        noise, batch = given["noise"], given["batch"]
        if given.get("prior_pred") is not None:
            return noise  # the whole batch is taught what is predicted without the LoRA
        samples = samples_of(batch)
        learnt = [row for row, item in enumerate(batch.file_items) if not item.is_reg]
        named = self._spared.naming([samples[row] for row in learnt])
        if not named:
            return noise
        if self._call is None or self._call[1]["batch"] is not batch:
            raise HookMissing("A loss was computed of another batch than the last prediction's.")
        run, step, state = self._call
        self._call = None

        def base(places: Tensor) -> Tensor:
            with aside(state):
                return run(**step)[places]

        rows = [learnt[row] for row in named]
        with aside(state), self._without_lora():
            return self._spared.target(
                noise, batch.latents, rows, look=self._look(run, step, rows), base=base,
                network=self._process.accelerator.unwrap_model(self._process.sd.unet),
            )  # fmt: skip

    def _look(self, run: Run, step: dict[str, Any], rows: list[int]) -> Look:
        """Return how the trainer looks at the pictures of some rows."""
        from toolkit.prompt_utils import concat_prompt_embeds

        sd, count = self._process.sd, len(step["noisy_latents"])
        some = take_rows(step, torch.tensor(rows), count)
        sigmas = sigma_of(sd.noise_scheduler.alphas_cumprod)
        nearest = nearest_timestep(sigmas, self._spared.regions.sigma)

        def look(latents: Tensor) -> None:
            timesteps = torch.full((len(latents),), nearest, device=latents.device)
            run(
                **some
                | {
                    "noisy_latents": sd.add_noise(latents, still_noise(latents), timesteps),
                    "timesteps": timesteps,
                    "conditional_embeds": concat_prompt_embeds([self._empty] * len(latents)),
                }
            )

        return look

    @contextmanager
    def _without_lora(self) -> Iterator[None]:
        network = self._process.network
        before, network.is_active = network.is_active, False
        try:
            yield
        finally:
            network.is_active = before
