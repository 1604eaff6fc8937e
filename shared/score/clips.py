"""What the text adds to a clip: to its frames, to all of them alike, and to how they differ.

After Chen, Liu, Shah et al. 2024, arXiv:2410.21669, who detect memorized content and memorized
motion of video models apart. The split into orthogonal parts is this project's own.
"""

from typing import NamedTuple

import torch

from ..arrays import Float, Tensor

DIMENSIONS = 4
"""Of one latent of a clip: channel, frame, height, width; an image has one less."""


class ClipNorms(NamedTuple):
    """L2 norms of the parts of D, the text-conditional noise of clips (latent units, >= 0).

    content**2 + motion**2 is the square of the norm of all of D, and so is the sum of frames**2.
    """

    frames: Float[Tensor, " *row frame"]
    """Of every frame by itself."""
    content: Float[Tensor, " *row"]
    """Of the mean over the frames, as often as there are frames: what is there all the time."""
    motion: Float[Tensor, " *row"]
    """Of what remains, each frame's deviation from that mean: what changes. 0 for a still."""

    def packed(self) -> Float[Tensor, " *row part"]:
        """Return all of them in one tensor: the frames, then content, then motion."""
        return torch.cat([self.frames, self.content[..., None], self.motion[..., None]], dim=-1)

    @classmethod
    def unpacked(cls, packed: Float[Tensor, " *row part"]) -> "ClipNorms":
        """Return the norms that `packed` holds."""
        return cls(packed[..., :-2], packed[..., -2], packed[..., -1])


def clip_norms(text_noise: Float[Tensor, " row channel frame *place"]) -> ClipNorms:
    """Return the norms of the parts of D, what the text adds to each clip.

    The mean over frames and the deviations from it are orthogonal, so their squares add up. Motion
    is measured on the deviations themselves: as a difference of squares it would lose its digits
    where little moves.

    Args:
        text_noise: From `metrics.text_noise`, of latents with frames.
    """
    # As in `text_noise_norm`: long sums of squares, and Apple's GPUs have nothing wider.
    wide = torch.float32 if text_noise.device.type == "mps" else torch.float64
    rows = text_noise.to(wide).movedim(2, 1).flatten(2)  # [row frame element]
    shared = rows.mean(dim=1, keepdim=True)
    norm = torch.linalg.vector_norm
    found = (
        norm(rows, dim=2),
        norm(shared, dim=(1, 2)) * rows.shape[1] ** 0.5,
        norm(rows - shared, dim=(1, 2)),
    )
    return ClipNorms(*(part.to(text_noise.dtype) for part in found))
