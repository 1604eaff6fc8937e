"""Pillow's pictures as ComfyUI's images."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ...shared.arrays import Float, Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def to_image(picture: "Image") -> Float[Tensor, " 1 height width 3"]:
    """Return an RGB picture as an IMAGE batch of one, 0..1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
