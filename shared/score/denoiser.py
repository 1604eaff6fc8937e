"""The one abstraction of the methods: a text-conditional diffusion network seen as a denoiser."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

Parametrization = Literal["epsilon", "v_prediction", "flow"]


@dataclass(frozen=True, kw_only=True)
class Token:
    """One position of the embeddings that the network attends to."""

    text: str
    """The piece as the tokenizer shows it, without end-of-word marks."""
    word: int | None
    """Index of the word of the prompt it belongs to; None for start, end and padding."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Prompts as a network reads them."""

    embeddings: Tensor
    """[prompt token width], differentiable leaf when a method makes it one."""
    pooled: Tensor | None = None
    """[prompt pooled_width], for networks that read a pooled text vector."""
    tokens: tuple[tuple[Token, ...], ...] = ()
    """Per prompt, what stands at each position of `embeddings`."""
    words: tuple[tuple[str, ...], ...] = ()
    """Per prompt, its words as typed, in order; `Token.word` indexes them."""
    cut: tuple[str, ...] = ()
    """Per prompt, the end that did not fit the text encoder, empty when all of it did."""
    sources: tuple[str, ...] = ()
    """Per prompt, the host's name for what goes with it besides the embeddings, if it needs one."""
    lengths: tuple[int, ...] = ()
    """Per prompt, how many positions of `embeddings` are its own; empty where all are."""
    others: tuple[Mapping[Any, Any], ...] = ()
    """Per prompt, what else the network reads of it (masks, other encoders' embeddings), by the
    argument of the network; empty where there is nothing else."""

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: Sequence[int] | slice) -> "Conditioning":
        """Return the prompts at `rows`."""
        index = list(range(len(self))[rows]) if isinstance(rows, slice) else list(rows)

        def pick(values: tuple) -> tuple:
            return tuple(values[i] for i in index) if values else ()

        return replace(
            self,
            embeddings=self.embeddings[index],
            pooled=None if self.pooled is None else self.pooled[index],
            tokens=pick(self.tokens),
            words=pick(self.words),
            cut=pick(self.cut),
            sources=pick(self.sources),
            lengths=pick(self.lengths),
            others=pick(self.others),
        )

    def detached(self) -> "Conditioning":
        """Return a copy outside any graph, of tensors that autograd accepts.

        It refuses inference tensors; whoever wants gradients calls this outside inference mode.
        """
        return replace(
            self,
            embeddings=self.embeddings.detach().clone(),
            pooled=None if self.pooled is None else self.pooled.detach().clone(),
            others=tuple({key: _detached(v) for key, v in row.items()} for row in self.others),
        )


def _detached(value: Any) -> Any:
    if isinstance(value, list):
        return [_detached(each) for each in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Join conditionings of one network along the prompts; shorter embeddings get zeros behind."""
    longest = max(part.embeddings.shape[1] for part in parts)
    padded = [pad(part.embeddings, (0, 0, 0, longest - part.embeddings.shape[1])) for part in parts]
    lengths = [part.lengths or (part.embeddings.shape[1],) * len(part) for part in parts]
    ragged = any(length < longest for each in lengths for length in each)
    return Conditioning(
        embeddings=torch.cat(padded),
        pooled=None if parts[0].pooled is None else torch.cat([part.pooled for part in parts]),
        tokens=sum((part.tokens for part in parts), ()),
        words=sum((part.words for part in parts), ()),
        cut=sum((part.cut for part in parts), ()),
        sources=sum((part.sources for part in parts), ()),
        lengths=sum(lengths, ()) if ragged else (),
        others=sum((part.others for part in parts), ()),
    )


@runtime_checkable
class Denoiser(Protocol):
    """A diffusion network as the memorization methods see it.

    Noise levels follow k-diffusion: for epsilon and v-prediction x = x0 + sigma * noise, with
    sigma = sqrt((1 - abar) / abar); for flows x = (1 - sigma) * x0 + sigma * noise. In both,
    (x0_uncond - x0_cond) / sigma is the difference of what the network predicts (noise or
    velocity) and the step ``x0 + sigma_next / sigma * (x - x0)`` is DDIM or Euler.
    """

    parametrization: Parametrization
    guidance_distilled: bool
    """The network guides itself; the empty prompt is an extra pass, scores have another scale."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent; frames after the channels for video."""

    @property
    def device(self) -> torch.device:
        """Where the network runs."""

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return the prompts as the network reads them, one row a prompt."""

    def unconditional(self) -> Conditioning:
        """Return the single row guidance moves away from: the empty prompt, or zeros."""

    def sigmas(self, steps: int) -> Tensor:
        """Return the noise levels of a sampling run, [steps + 1], noisiest first."""

    def initial_noise(self, seeds: Sequence[int], sigma: Tensor) -> Tensor:
        """Return x at `sigma` as the host starts sampling from each seed, [seed *latent]."""

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the x0-prediction, [row *latent], differentiable in x and in the embeddings.

        Args:
            x: [row *latent] at `sigma`.
            sigma: Scalar noise level, an element of `sigmas`.
            cond: One row per row of `x`.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class TextInputs:
    """One prompt, and the graph to what the network reads from what its text encoders read."""

    cond: Conditioning
    """The prompt as a single row, differentiable in `leaves`."""
    leaves: tuple[Tensor, ...]
    """Per text encoder, its input token embeddings [1 token width], at least float32."""
    tokens: tuple[tuple[Token, ...], ...]
    """Per text encoder, what stands at each position of its input."""


@runtime_checkable
class InputsEncoder(Denoiser, Protocol):
    """A denoiser whose host can differentiate through its text encoders; not every host can."""

    def encode_inputs(self, prompt: str) -> TextInputs:
        """Return a prompt with the graph from the text encoders' input embeddings."""
