"""A word that is learnt from images of a concept, with a LoRA or without, to ask for it by."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...shared.files.tensors import TensorFolder
from ...shared.training.concept.concept import load_templates
from ...shared.training.concept.images import latents_of
from ...shared.training.concept.learnt_word import WORD, knowing, learn
from ..common.measure import Bars

if TYPE_CHECKING:
    from ...shared.models.adapter import PipelineDenoiser

LIKE = "picture"
"""Whose embedding the word starts from."""
ENCODERS = 10
"""More than a pipeline has, so that each word has numbers of its own."""


@contextmanager
def reading_word(
    denoiser: "PipelineDenoiser",
    images: Sequence[Path],
    kept: TensorFolder,
    number: int,
    *,
    steps: int,
    bars: Bars,
) -> Iterator[None]:
    """Let the pipeline read `WORD` for as long as the block lasts, learnt once and kept.

    Args:
        denoiser: As it is to be attacked: with its LoRA on or off.
        images: Of the concept.
        kept: Where the word's embeddings are kept.
        number: Of the word.
        steps: In which it is learnt.
        bars: Makes progress bars.
    """
    with knowing(denoiser.pipeline, LIKE) as vectors:
        known = kept.known()
        numbers = [ENCODERS * number + place for place in range(len(vectors))]
        if set(numbers) <= known.keys():
            with torch.no_grad():
                for place, vector in zip(numbers, vectors, strict=True):
                    vector.copy_(known[place])
        else:
            with closing(bars(f"learning a word ({WORD})", steps, 0, "step")) as bar:
                learn(denoiser, vectors, latents_of(denoiser, images), load_templates(),
                      steps=steps, progress=bar.update)  # fmt: skip
            for place, vector in zip(numbers, vectors, strict=True):
                kept.put(place, vector.detach().cpu())
        yield
