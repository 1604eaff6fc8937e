"""A word for what images show, learnt on a model that stays as it is.

Textual inversion (Gal et al., ICLR 2023, arXiv:2208.01618): the input embedding of one new token
is optimised so that the network denoises the images. Text-fed layers read the token as they would
read the concept if it had a name.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...arrays import Float, Tensor
from ...models.adapter import PipelineDenoiser
from ...score.detection import Progress
from .concept import PLACE

WORD = "<learnt>"
"""How the word is written."""
READERS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
"""Parts of a pipeline that read one prompt side by side."""
RATE = 5e-3
"""Of Adam, in units of the embedding: that of the authors' code for one image at a time."""
BATCH = 4
"""Images in each step, all at one noise level."""


@contextmanager
def knowing(pipeline: Any, like: str) -> Iterator[list[Tensor]]:
    """Let a pipeline read `WORD` for as long as the block lasts.

    Args:
        pipeline: Of diffusers, with a U-Net.
        like: Text whose mean token the word starts from.

    Yields:
        The word's embedding in each encoder, [width] in float32; change them in place.

    Raises:
        ValueError: The pipeline has no U-Net: its text reaches the layers mixed with the image.
    """
    if not hasattr(pipeline, "unet"):
        raise ValueError("A word is learnt for SD 1, SD 2 and SDXL, whose layers read text states.")
    with ExitStack() as undo:
        yield [
            undo.enter_context(_reading(pipeline, tokenizer, getattr(pipeline, encoder), like))
            for tokenizer, encoder in READERS
            if getattr(pipeline, encoder, None) is not None
        ]


@contextmanager
def _reading(pipeline: Any, name: str, encoder: nn.Module, like: str) -> Iterator[Tensor]:
    """Let one encoder read the word: a copy of the tokenizer knows it, hooks embed it."""
    known = getattr(pipeline, name)
    taught = copy.deepcopy(known)
    taught.add_tokens([WORD])
    number = taught.convert_tokens_to_ids(WORD)
    table = encoder.get_input_embeddings()
    ids = known(like, add_special_tokens=False).input_ids
    vector = table.weight.detach()[ids].float().mean(0).requires_grad_()
    places: list[Tensor] = []

    def hide(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        places.append(args[0] == number)
        return (args[0].masked_fill(places[-1], 0),)  # the table has no row for it

    def show(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.where(places.pop()[..., None], vector.to(output.dtype), output)

    hooks = table.register_forward_pre_hook(hide), table.register_forward_hook(show)
    try:
        setattr(pipeline, name, taught)
        yield vector
    finally:
        setattr(pipeline, name, known)
        for hook in hooks:
            hook.remove()


def learn(
    denoiser: PipelineDenoiser,
    vectors: Sequence[Tensor],
    latents: Float[Tensor, " image *latent"],
    templates: Sequence[str],
    *,
    steps: int = 500,
    rate: float = RATE,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """Optimise the word's embeddings, inside `knowing`, and return the loss before and after.

    Args:
        denoiser: Of the pipeline.
        vectors: What `knowing` yielded.
        latents: Clean ones of the images.
        templates: Sentences with one `{}`, one of which is drawn in each step.
        steps: Of Adam.
        rate: Its learning rate.
        seed: Of noise, levels, images and sentences.
        progress: Called after each step.

    Returns:
        Mean squared error of the predicted noise per element over the first and over the last
        tenth of the steps: noisy, each step has a level of its own.
    """
    optimizer = torch.optim.Adam(list(vectors), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    sigmas = denoiser.sigmas(50)[:-1]
    losses = []

    def drawn(count: int, number: int = 1) -> list[int]:
        return torch.randint(count, (number,), generator=generator).tolist()

    for _ in range(steps):
        rows = drawn(len(latents), BATCH)
        sentence = templates[drawn(len(templates))[0]].replace(PLACE, WORD)
        sigma = sigmas[drawn(len(sigmas))[0]].to(latents)
        noise = torch.randn(latents[rows].shape, generator=generator).to(latents)
        own = denoiser.family.encode([sentence])
        cond = replace(
            denoiser.encode([sentence]), embeddings=own.embeddings, pooled=own.pooled,
            others=own.others,
        )  # fmt: skip
        x0 = denoiser.denoise(latents[rows] + sigma * noise, sigma, cond[[0] * len(rows)])
        errors = ((x0 - latents[rows]) / sigma).square()
        # The sum, not the mean: Adam ignores the scale of a loss, and in half precision the
        # gradients of the mean would vanish.
        gradients = torch.autograd.grad(errors.sum(), vectors)
        for vector, gradient in zip(vectors, gradients, strict=True):
            vector.grad = gradient
        optimizer.step()
        losses.append(errors.mean().item())
        if progress is not None:
            progress(1)
    tenth = max(1, steps // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
