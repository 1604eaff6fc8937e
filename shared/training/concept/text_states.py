"""What text-fed layers read: a text encoder's states, and what a concept changes in them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...arrays import Float, Tensor
from ...models.tokens import read
from ...score.denoiser import Denoiser
from .concept import PromptPair

if TYPE_CHECKING:
    from ...models.adapter import PipelineDenoiser

BATCH = 32
"""Prompts encoded at once."""


@dataclass(frozen=True, kw_only=True)
class TextStates:
    """Prompts as the text-fed layers of a network read them."""

    states: Tensor
    """[prompt token width], exactly what the layers get in training."""
    words: tuple[tuple[int | None, ...], ...]
    """Per prompt and token the index of its word; None for start, end and padding."""
    encoders: tuple[int, ...] = ()
    """Widths of the encoders joined along the last axis (SDXL: 768, 1280); empty for one."""

    def __post_init__(self) -> None:
        prompts, tokens, width = self.states.shape
        if len(self.words) != prompts or any(len(row) != tokens for row in self.words):
            raise ValueError(f"`words` must hold {tokens} entries for each of {prompts} prompts.")
        if self.encoders and sum(self.encoders) != width:
            raise ValueError(f"`encoders` must sum to the width {width}, got {self.encoders}.")
        if not torch.isfinite(self.states).all():
            raise ValueError("The text encoder gives NaN or infinity: is its precision too low?")


TextPath = Callable[[Sequence[str]], TextStates]
"""A trainer's own way from prompts to states: clip skip, chunks, joined encoders and all."""


def text_path_of(denoiser: Denoiser, encoders: tuple[int, ...] = ()) -> TextPath:
    """Return the text path of a denoiser.

    Args:
        denoiser: Its `encode` is called.
        encoders: Widths of the encoders that it joins; empty for one.
    """

    def encode(prompts: Sequence[str]) -> TextStates:
        cond = denoiser.encode(prompts)
        words = tuple(tuple(token.word for token in row) for row in cond.tokens)
        return TextStates(states=cond.embeddings.detach(), words=words, encoders=encoders)

    return encode


def pipeline_text_path(denoiser: "PipelineDenoiser") -> TextPath:
    """Return the text path of a diffusers pipeline, with the widths of SDXL's two encoders."""
    return text_path_of(denoiser, encoders_of(denoiser.pipeline))


def read_states(parts: Sequence[Tensor], tokenizer: Any, prompts: Sequence[str]) -> TextStates:
    """Return prompts as text-fed layers read them, from what a trainer's text encoders give.

    Args:
        parts: One for each encoder, [prompt token width]; they are joined.
        tokenizer: Of the first encoder.
        prompts: Those that were encoded.
    """
    states = torch.cat(list(parts), dim=-1)
    readings = [read(tokenizer, prompt, states.shape[1]) for prompt in prompts]
    return TextStates(
        states=states,
        words=tuple(tuple(token.word for token in reading.tokens) for reading in readings),
        encoders=tuple(part.shape[-1] for part in parts) if len(parts) > 1 else (),
    )


def encoders_of(pipeline: Any) -> tuple[int, ...]:
    """Return the widths of the encoders that a diffusers pipeline joins, empty for one encoder."""
    parts = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    widths = tuple(part.config.hidden_size for part in parts if part is not None)
    # SD3 and Flux have several encoders too, but put T5's states elsewhere than beside CLIP's.
    return widths if hasattr(pipeline, "unet") and len(widths) > 1 else ()


def in_batches(text_path: TextPath, prompts: Sequence[str]) -> Iterable[TextStates]:
    """Yield the states of `prompts`, a few at a time."""
    for start in range(0, len(prompts), BATCH):
        yield text_path(prompts[start : start + BATCH])


def differences(text_path: TextPath, pairs: Sequence[PromptPair]) -> Float[Tensor, " row width"]:
    """Return what the concept changes in the states of its sentences, in float64 on the CPU.

    Per pair: each token of the name minus the mean of the neutral word's tokens, the end token
    minus the twin's, and the padding minus the twin's at the same place. The padding of a prompt
    counts as one row, else its many places would decide. The first token is left out: it is the
    same for every prompt.

    Raises:
        ValueError: A prompt is so long that the text encoder does not read the name.
    """
    rows = []
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        ours = text_path([pair.prompt for pair in batch])
        twins = text_path([pair.twin for pair in batch])
        for index, pair in enumerate(batch):
            state, twin = (each.states[index].cpu().double() for each in (ours, twins))
            words, twin_words = ours.words[index], twins.words[index]
            subject = [place for place, word in enumerate(words) if word in pair.subject]
            other = [place for place, word in enumerate(twin_words) if word in pair.twin_subject]
            if not subject or not other:
                raise ValueError(f"The text encoder does not read the subject of {pair.prompt!r}.")
            rows.append(state[subject] - twin[other].mean(0))
            end, twin_end = _end(words), _end(twin_words)
            if end < len(state) and twin_end < len(twin):
                rows.append((state[end] - twin[twin_end])[None])
            padding = slice(max(end, twin_end) + 1, min(len(state), len(twin)))
            if len(pad := state[padding] - twin[padding]):
                rows.append(pad / len(pad) ** 0.5)
    return torch.cat(rows)


def token_weights(words: Sequence[int | None]) -> Float[Tensor, " token"]:
    """Return the weight of each token of a prompt: 1 each, and 1 for the whole padding."""
    weights = torch.ones(len(words), dtype=torch.float64)
    padding = weights[_end(words) + 1 :]
    padding.fill_(1 / max(1, len(padding)))
    return weights


def _end(words: Sequence[int | None]) -> int:
    """Return the place of the end token: the one after the last word's."""
    last = max((place for place, word in enumerate(words) if word is not None), default=0)
    return last + 1
