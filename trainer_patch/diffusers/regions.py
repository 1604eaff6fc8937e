"""The concept's regions in a step with diffusers and PEFT: the target of a prediction."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, is_grad_enabled, nn

from ...shared.arrays import take_rows
from ...shared.models.adapter import PipelineDenoiser
from ...shared.training.base_targets import BaseTargets
from ...shared.training.filter.sample_log import Sample
from ...shared.training.layers.regions import looking
from ...shared.training.projection.factors import UnsupportedTraining
from ...shared.training.replay import RandomState, aside


class SparedTargets:
    """Remembers what the network was last called with, and repeats it with the LoRA off."""

    def __init__(self, network: nn.Module, denoiser: PipelineDenoiser, spared: BaseTargets):
        """Encode the empty prompt, while the text encoders are there.

        Args:
            network: The denoiser's, that carries the LoRA.
            denoiser: Of the pipeline that is trained.
            spared: Of the training.
        """
        self._network, self._denoiser, self._spared = network, denoiser, spared
        with aside(RandomState.now(network.device)):
            self._look = looking(denoiser, spared.regions.sigma)
        self._call: tuple[tuple, dict[str, Any]] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Remember every call with gradient, for as long as the block lasts."""
        hook = self._network.register_forward_pre_hook(self._remember, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self._call = None

    def target(
        self, target: Tensor, latents: Tensor, samples: Sequence[Sample], *, others: int = 0
    ) -> Tensor:
        """Return the target of the step whose prediction was made last.

        Args:
            target: [sample channel height width].
            latents: Clean ones, in the network's scale, of the same shape.
            samples: Those of the step, with captions where the concept has names.
            others: Rows behind those of the samples, which are not looked at.

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
            self._spared.names and not all(sample.caption for sample in samples)
        ):
            raise UnsupportedTraining(
                "Which pictures name the concept is not known: in one's own loop set "
                "`loop.samples` in each step to a Sample(file=..., caption=...) for each row of "
                "the target; a script's loader must tell one caption for each picture."
            )
        if self._call is None:
            raise UnsupportedTraining("Ask for the target after the network's prediction.")
        if not (rows := self._spared.naming(samples)):
            return target
        with aside(RandomState.now(self._network.device)), self._denoiser.lora_disabled():
            return self._spared.target(
                target, latents, rows,
                network=self._network, look=self._look, base=self._base(len(target)),
            )  # fmt: skip

    def _base(self, count: int) -> Any:
        """Return how to predict some rows of the step anew."""

        def predict(places: Tensor) -> Tensor:
            args, kwargs = take_rows(self._call, places, count)
            return self._network(*args, **kwargs)[0]

        return predict

    def _remember(self, network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if is_grad_enabled():
            self._call = args, kwargs
