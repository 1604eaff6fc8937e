"""The concept's regions over one whole training: which targets are replaced there, and how many."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..arrays import Float, Tensor
from .concept.concept import named_words
from .filter.sample_log import Sample
from .layers.regions import ConceptRegions, Look

logger = logging.getLogger(__name__)


class NoTargetSeen(RuntimeError):
    """Regions were requested, and no training step handed in its target."""


class BaseTargets:
    """Replaces targets in the concept's regions by what the model predicts without the LoRA.

    Only samples whose captions name the concept are looked at.
    """

    def __init__(self, regions: ConceptRegions, names: Sequence[str]):
        """Set up.

        Args:
            regions: Of the model before training.
            names: What captions call the concept; without any, every sample is looked at.
        """
        self.regions, self.names = regions, tuple(names)
        self._counts = {"samples": 0, "named": 0, "with_regions": 0}
        self._places = 0.0

    def naming(self, samples: Sequence[Sample]) -> list[int]:
        """Return the rows of a step's batch whose captions name the concept; all without names."""
        rows = [
            row
            for row, sample in enumerate(samples)
            if not self.names or named_words(self.names, sample.caption) is not None
        ]
        self._counts["samples"] += len(samples)
        self._counts["named"] += len(rows)
        return rows

    def target(
        self,
        target: Float[Tensor, "sample channel height width"],
        latents: Float[Tensor, "sample channel height width"],
        rows: list[int],
        *,
        network: nn.Module,
        look: Look,
        base: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "sample channel height width"]:
        """Return a step's target, in the concept's regions what is predicted without the LoRA.

        The caller switches the LoRA off and leaves no trace in the random state.

        Args:
            target: What the network would be taught: noise, velocity or flow.
            latents: Clean ones, in the network's scale.
            rows: Of `naming`, at least one.
            network: Whose layers are recorded.
            look: Runs it on some of the latents.
            base: Returns the prediction of the step's own inputs at some rows [row].
        """
        regions = self.regions.find(network, look, latents[rows])
        shares = regions.flatten(1).float().mean(1)
        self._counts["with_regions"] += int((shares > 0).sum())
        self._places += float(shares.sum())
        if not regions.any():
            return target
        places = torch.tensor(rows, device=target.device)
        made = target.detach().clone()
        made[places] = torch.where(regions, base(places).to(made), made[places])
        return made

    def account(self) -> dict[str, Any]:
        """Return what the LoRA's metadata say: samples of this process, visit by visit.

        `share_of_places` is the mean over the samples that have regions, None without any.
        """
        shown = self._counts["with_regions"]
        return self._counts | {"share_of_places": self._places / shown if shown else None}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, plain data."""
        return self._counts | {"places": self._places}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._counts = {name: state[name] for name in self._counts}
        self._places = state["places"]

    def finish(self) -> None:
        """Log how many samples had their targets replaced.

        Raises:
            NoTargetSeen: No sample was ever looked at.
        """
        counts = self.account()
        if not counts["samples"]:
            raise NoTargetSeen("No training step handed its target to the concept's regions.")
        if not counts["named"]:
            logger.warning("No caption named %s: no target was replaced.", ", ".join(self.names))
            return
        logger.info(
            "Regions: %d of %d samples named the concept, %d of them show it, on %.1f %% of "
            "their places.",
            counts["named"], counts["samples"], counts["with_regions"],
            100 * (counts["share_of_places"] or 0.0),
        )  # fmt: skip
