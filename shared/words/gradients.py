"""Gradients of the score with respect to what a text encoder gives, and to what it reads."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..arrays import Float, Tensor
from ..score.config import DetectionConfig
from ..score.denoiser import Conditioning, Denoiser, InputsEncoder, Token
from ..score.metrics import difference_map, text_noise, text_noise_norm
from ..score.trajectory import (
    ROWS_OF_A_GRADIENT,
    automatic_rows,
    guided_step,
    loss_scale,
    not_finite,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenGradients:
    """How strongly the score depends on each token."""

    tokens: tuple[Token, ...]
    values: tuple[float, ...]
    """Per token, L2 norm of the gradient (>= 0)."""
    difference_map: Float[Tensor, " *place"]
    """log(1 + D squared summed over channels) at the first seed and step, on the CPU."""

    def of_words(self, words: int) -> list[float]:
        """Return one value per word of the prompt, [word]."""
        return merge_into_words(self.tokens, self.values, words)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Gradients:
    """d|D| / d(what the network reads of the prompt), at the points of a trajectory."""

    norms: Float[Tensor, " token"]
    """L2 norm per position of the embeddings, mean over seeds and steps, float64 on the CPU."""
    embeddings: Float[Tensor, "1 token width"]
    """The gradient itself, mean over seeds and steps."""
    pooled: Float[Tensor, "1 pooled_width"] | None
    difference_map: Tensor


def merge_into_words(
    tokens: Sequence[Token], significance: Sequence[float], words: int
) -> list[float]:
    """Return per word the root of the sum of squares over its tokens, [word]."""
    squares = [0.0] * words
    for token, value in zip(tokens, significance, strict=True):
        if token.word is not None:
            squares[token.word] += value**2
    return [math.sqrt(square) for square in squares]


def encoder_gradient(
    denoiser: Denoiser, prompt: str, cond: Conditioning, config: DetectionConfig
) -> TokenGradients:
    """Return the gradients at the text encoder's output, as published.

    L2 norm of d|D| / d embedding, mean over seeds and steps, each at its point of the true
    trajectory (uncond + cond_scale * (cond - uncond)), which is held fixed; after Wen et al., ICLR
    2024, arXiv:2407.21720, section 5. An encoder mixes words, so a position of its output stands
    for all words that it attends to: see `input_gradient`.

    Args:
        denoiser: The network.
        prompt: For the message of an error.
        cond: The prompt, encoded and detached.
        config: Seeds and steps.

    Raises:
        PredictionError: A gradient is NaN or infinite.
    """
    found = _at_the_output(denoiser, prompt, cond, config)
    return TokenGradients(
        tokens=cond.tokens[0], values=tuple(found.norms.tolist()),
        difference_map=found.difference_map,
    )  # fmt: skip


def input_gradient(denoiser: InputsEncoder, prompt: str, config: DetectionConfig) -> TokenGradients:
    """Return the gradients at the token embeddings that the text encoders read.

    L2 norm of d(mean of |D| over seeds and steps) / d(input embedding) of each token of each text
    encoder. Encoders of one pipeline are not weighted against each other.

    Args:
        denoiser: A network whose host can differentiate through its text encoders.
        prompt: Any string.
        config: Seeds and steps.

    Raises:
        PredictionError: A gradient is NaN or infinite.
    """
    inputs = denoiser.encode_inputs(prompt)
    found = _at_the_output(denoiser, prompt, inputs.cond.detached(), config)
    pairs = [(inputs.cond.embeddings, found.embeddings)]
    if inputs.cond.pooled is not None and found.pooled is not None:
        pairs.append((inputs.cond.pooled, found.pooled))
    # An encoder that was left out gives constants, and reads nothing.
    pairs = [(output, gradient) for output, gradient in pairs if output.requires_grad]
    scale = loss_scale(denoiser)
    gradients = torch.autograd.grad(
        [output for output, _ in pairs], inputs.leaves,
        [(scale * gradient).to(output) for output, gradient in pairs], allow_unused=True,
    )  # fmt: skip
    norms = [
        torch.zeros(leaf.shape[:2]) if gradient is None else gradient.norm(dim=2).cpu() / scale
        for leaf, gradient in zip(inputs.leaves, gradients, strict=True)
    ]
    values = torch.cat([norm[0].to(torch.float64) for norm in norms])
    _check(values, prompt, denoiser)
    return TokenGradients(
        tokens=sum(inputs.tokens, ()), values=tuple(values.tolist()),
        difference_map=found.difference_map,
    )  # fmt: skip


def _at_the_output(
    denoiser: Denoiser, prompt: str, cond: Conditioning, config: DetectionConfig
) -> _Gradients:
    """Return the gradients at what the network reads, in batches of seeds."""
    rows = max(1, (config.batch_size or automatic_rows(denoiser)) // ROWS_OF_A_GRADIENT)
    norms: list[Tensor] = []
    sums: list[list[Tensor]] = []
    heat = None
    for start in range(0, len(config.seeds), rows):
        part = replace(config, seeds=config.seeds[start : start + rows])
        for gradients, first in _along(denoiser, cond, part):
            norms.append(gradients[0].norm(dim=2).sum(0))
            sums.append([gradient.sum(0, keepdim=True) for gradient in gradients])
            heat = first if heat is None else heat
    assert heat is not None  # a config has a seed and a step
    count = len(config.seeds) * config.steps
    total = torch.stack(norms).sum(0).to("cpu").to(torch.float64) / count
    _check(total, prompt, denoiser)
    means = [torch.stack(each).sum(0) / count for each in zip(*sums, strict=True)]
    return _Gradients(
        norms=total, embeddings=means[0], pooled=means[1] if len(means) > 1 else None,
        difference_map=heat,
    )  # fmt: skip


def _along(
    denoiser: Denoiser, cond: Conditioning, config: DetectionConfig
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Yield per step d|D| / d(embeddings, pooled) of each seed; at first, the first seed's map."""
    seeds = len(config.seeds)
    many, empty = cond[[0] * seeds], denoiser.unconditional().detached()[[0] * seeds]
    cond_scale = 1.0 if denoiser.guidance_distilled else config.cond_scale
    sigmas = denoiser.sigmas(config.schedule_steps)
    x = denoiser.initial_noise(config.seeds, sigmas[0])
    scale = loss_scale(denoiser)
    for step in range(config.steps):
        sigma = sigmas[step]
        with torch.no_grad():
            x0_uncond = denoiser.denoise(x, sigma, empty)
        with torch.enable_grad():
            leaves, leafed = _with_leaves(many)
            x0_cond = denoiser.denoise(x, sigma, leafed)
            loss = scale * (text_noise_norm(x0_cond, x0_uncond) / sigma).sum()
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        pairs = zip(leaves, found, strict=True)
        gradients = [torch.zeros_like(leaf) if g is None else g / scale for leaf, g in pairs]
        x0_cond = x0_cond.detach()
        yield gradients, map_of(x0_uncond, x0_cond, sigma) if step == 0 else None
        if step + 1 < config.steps:
            x = guided_step(x, x0_uncond, x0_cond, sigma, sigmas[step + 1], cond_scale)


def map_of(x0_uncond: Tensor, x0_cond: Tensor, sigma: Tensor) -> Float[Tensor, " *place"]:
    """Return where the text acts in the first row, on the CPU."""
    return difference_map(text_noise(x0_uncond[:1], x0_cond[:1], sigma))[0].cpu()


def _with_leaves(cond: Conditioning) -> tuple[list[Tensor], Conditioning]:
    """Return wide leaves, so that their gradients are wide, and the same in the network's dtype."""
    tensors = [cond.embeddings] if cond.pooled is None else [cond.embeddings, cond.pooled]
    leaves = [
        tensor.to(torch.promote_types(tensor.dtype, torch.float32)).detach().clone()
        for tensor in tensors
    ]
    narrow = [
        leaf.requires_grad_().to(tensor.dtype) for leaf, tensor in zip(leaves, tensors, strict=True)
    ]
    pooled = narrow[1] if len(narrow) > 1 else None
    return leaves, replace(cond, embeddings=narrow[0], pooled=pooled)


def _check(values: Tensor, prompt: str, denoiser: Denoiser) -> None:
    if not bool(values.isfinite().all()):
        raise not_finite(f"The gradient for the prompt {prompt[:200]!r}", denoiser)
