"""The concept's regions in a script of diffusers, which asks nobody for its target.

A loss of prediction - target is the same when the prediction gains what the target should lose,
however a script weighs samples and timesteps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...shared.patching import Function, patched
from ...shared.training.filter.sample_log import Sample
from ...shared.training.projection.factors import UnsupportedTraining
from .regions import SparedTargets


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
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return self.noise
        if kind == "v_prediction":
            return self.scheduler.get_velocity(self.latents, self.noise, self.timesteps)
        raise UnsupportedTraining(f"project_regions does not know the target of {kind!r}.")


class SparedPredictions:
    """Moves each prediction by what its target changes."""

    def __init__(
        self,
        network: nn.Module,
        targets: SparedTargets,
        samples: Callable[[], Sequence[Sample]],
        *,
        prior_preservation: bool = False,
    ):
        """Set up; `attached` puts the hooks on.

        Args:
            network: A U-Net, that is trained.
            targets: Of the same network.
            samples: Who is in the batch; asked in each step.
            prior_preservation: The second half of each batch are class images; they are not
                looked at.
        """
        self._network, self._targets, self._samples = network, targets, samples
        self._halves = 2 if prior_preservation else 1
        self._noising: Noising | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Move the predictions of every forward pass with gradient, for as long as it lasts.

        After the filter's hooks, which look at predictions as they are.

        Raises:
            HookMissing: The installed scheduler does not noise as expected.
        """
        from diffusers import DDPMScheduler

        with ExitStack() as undo:
            undo.enter_context(patched(DDPMScheduler, "add_noise", self._remember))
            undo.enter_context(self._targets.attached())
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
            return None  # sampling for validation, and the passes that regions need
        noising, self._noising = self._noising, None
        given = args[0] if args else kwargs["sample"]
        if noising is None or not torch.equal(given, noising.noisy.to(given)):
            raise UnsupportedTraining(
                "The network was given other latents than DDPMScheduler.add_noise made last: "
                "project_regions cannot tell what this script teaches. Leave it out."
            )
        target = noising.target().float()
        others = len(target) - len(target) // self._halves
        spared = self._targets.target(target, noising.latents, self._samples(), others=others)
        if spared is target:
            return None
        # In this order a LoRA that does nothing yet has a loss of exactly 0 in the regions.
        moved = torch.where(spared == target, prediction, target + (prediction - spared))
        return (moved, *output[1:]) if isinstance(output, tuple) else type(output)(moved)
