"""What a method of repair is given, and what it returns."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ....shared.models.lora.names import Place
from ...common.measure import Bars
from .predictions import Batch
from .weights import Factors, LoraWeights

if TYPE_CHECKING:
    from ....shared.models.adapter import PipelineDenoiser

Path = Callable[[float], Factors]
"""Takes how much is left, 1 for the LoRA as it is, and returns the factors; at 0 most is gone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A LoRA on its base model, with what it should lose and what it should keep."""

    denoiser: "PipelineDenoiser"
    weights: LoraWeights
    memorized: tuple[Batch, ...]
    """Captions of images that come back, and their other wordings."""
    held: tuple[Batch, ...]
    """Other prompts; what is kept is measured on prompts that are not among them."""
    bars: Bars

    @contextmanager
    def trained(self, places: Sequence[Place]) -> Iterator[dict[Place, nn.Parameter]]:
        """Let factors B take gradients for a block; afterwards the LoRA is as it was."""
        factors = {place: self.weights.parameter(place) for place in places}
        try:
            with torch.enable_grad():
                for factor in factors.values():
                    factor.requires_grad_(True)
                yield factors
        finally:
            for factor in factors.values():
                factor.requires_grad_(False)
            self.weights.put(self.weights.original)


Method = Callable[[Case], Path]
