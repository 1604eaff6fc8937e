"""Nearest-neighbour guidance away from a folder of training images."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher

from ...shared.files.images import read_image
from ...shared.mitigation.method import Method
from ...shared.mitigation.neighbour import NearestNeighbour
from .references import images_below


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderNeighbours(Method):
    """The images of a folder, encoded once the size of a run is known."""

    name: ClassVar[str] = NearestNeighbour.name
    needs_guidance: ClassVar[bool] = True

    folder: str
    """Absolute, or below ComfyUI's input folder."""
    vae: Any
    """VAE of the model."""
    settings: dict[str, float]
    """Of `NearestNeighbour`."""
    _made: dict[tuple[int, ...], NearestNeighbour] = field(default_factory=dict)

    def at(self, model: ModelPatcher, shape: tuple[int, ...]) -> NearestNeighbour:
        """Return the method for latents of this shape.

        Args:
            model: Gives the scale of latents that its network works in.
            shape: Of one latent.

        Raises:
            ValueError: There is no such folder, no image in it, or one that cannot be read.
        """
        if shape not in self._made:
            factor = self.vae.spacial_compression_encode()
            width, height = shape[-1] * factor, shape[-2] * factor
            latents = []
            for path in images_below(self.folder, "Memorization Guard"):
                pixels = np.asarray(read_image(path).resize((width, height)), dtype=np.float32)
                latents.append(self.vae.encode(torch.from_numpy(pixels / 255)[None]))
            scaled = model.model.process_latent_in(torch.cat(latents))
            self._made[shape] = NearestNeighbour(latents=scaled, **self.settings)
        return self._made[shape]
