"""Prompt-embedding optimisation: move the embedding until the prompt no longer dictates.

Wen et al., ICLR 2024, arXiv:2407.21720.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..score.metrics import text_noise_norm
from .constants import Constants
from .method import Method, Start
from .optimisation import (
    Optimised,
    check_descent,
    descend,
    find_target,
    gradients,
)

UNMOVED = "nothing: the magnitude at the image's own noise is at the target already"


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptimisation(Method):
    """Minimise |D(e)| at the run's first noise over the prompt's embedding e.

    Modified: the paper has one e per prompt and the mean of |D| over its images; here every image
    has its own e and stops by itself, so that an image does not depend on those beside it. The
    paper's AdamW also decays the first token, by 0.5 % in ten iterations; here it stays.
    Pooled text, which SDXL reads beside the embedding, is not changed.
    """

    name: ClassVar[str] = "embedding"

    learning_rate: float = 0.05
    """Of AdamW, above 0 (authors' code: optim_lr, 0.05)."""
    iterations: int = 10
    """Optimizer steps at most, at least 0 (authors' code: optim_iters, 10); 0 changes nothing."""
    target: float | None = None
    """|D| to stop at, L2 norm in latent units, at least 0 (paper: l_target, 1 to 5 on SD 1.4; the
    authors' README: 3). It depends on model and resolution; None takes `target_quantile`."""
    target_quantile: float = 0.8
    """Share of the calibration's control scores below the target, 0..1; ours, not the paper's."""
    batch_size: int | None = None
    """Rows of one pass with gradient, at least 1; None chooses by device and latent size."""
    checkpointing: bool = False
    """Recompute activations instead of keeping them: less memory, a third more time."""

    def __post_init__(self) -> None:
        check_descent(self.learning_rate, self.target, self.target_quantile, self.batch_size)
        if self.iterations < 0:
            raise ValueError(f"`iterations` must be at least 0, got {self.iterations}.")

    def start(self, start: Start) -> Optimised:
        """Return the conditioning with each image's best embedding.

        x is fixed, so its unconditional prediction is given and needs no graph: an image costs one
        conditional forward and backward pass per iteration and one more forward pass, all without
        the parts of the network that come before the text. The first token is the same for every
        prompt and stays bit for bit, as does the embedding of an image at or below the target.

        Raises:
            ValueError: There is nothing to take the target from, or no way to recompute.
            PredictionError: A prediction or gradient is not finite.
        """
        target = find_target(start, self.target, self.target_quantile)
        with gradients(start.network, checkpointing=self.checkpointing):
            cond, x, sigma = start.cond.detached(), start.x.detach().clone(), start.sigma.clone()
            x0_uncond, dtype = start.x0_uncond.detach().clone(), cond.embeddings.dtype
            constants = Constants(None if self.checkpointing else start.network)

            def magnitude(rows: list[int], rest: Tensor) -> Tensor:
                embeddings = torch.cat([cond.embeddings[rows, :1], rest.to(dtype)], dim=1)
                with constants.of(tuple(rows)):
                    changed = replace(cond[rows], embeddings=embeddings)
                    x0_cond = start.denoiser.denoise(x[rows], sigma, changed)
                return text_noise_norm(x0_cond, x0_uncond[rows]) / sigma

            best = descend(
                # The leaves are wide, so that their gradients are; the network gets its own dtype.
                list(cond.embeddings[:, 1:].to(torch.promote_types(dtype, torch.float32))),
                magnitude,
                target=target,
                learning_rate=self.learning_rate,
                iterations=self.iterations,
                denoiser=start.denoiser,
                batch_size=self.batch_size,
            )
            embeddings = torch.cat([cond.embeddings[:, :1], best.rows.to(dtype)], dim=1)
        moved = (embeddings != cond.embeddings).flatten(1).any(1).tolist()
        changes = tuple("the embedding" if each else UNMOVED for each in moved)
        return Optimised(best, cond=replace(cond, embeddings=embeddings), changes=changes)
