"""What every way of mitigating while sampling looks like to its host.

A method acts before the first step, on the conditioning or the initial noise, or at every step, on
the guided prediction. It knows a `Denoiser` and tensors, never a host; the host calls it only for
images whose prompts the gate let through.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..score.calibration import Calibration
from ..score.denoiser import Conditioning, Denoiser
from .gate import ScoredNoises


@dataclass(frozen=True, kw_only=True)
class Start:
    """A sampling run before its first step."""

    denoiser: Denoiser
    cond: Conditioning
    """One row per image."""
    x: Tensor
    """[image *latent] the run's initial noise, at `sigma`."""
    sigma: Tensor
    """Noise level of the first step that scores are measured and calibrated at."""
    x0_uncond: Tensor
    """[image *latent] predicted from the empty prompt at `x`, without a graph."""
    generator: torch.Generator
    """On the CPU, for methods that draw; seeded by the host, so that a run can be repeated."""
    prompts: tuple[str, ...] = ()
    """One per image; empty when the host was given embeddings."""
    calibration: Calibration | None = None
    """Of this model; None when the gate needs none."""
    network: nn.Module | None = None
    """For methods that change attention; None where a host cannot hand it out."""
    noises: ScoredNoises | None = None
    """Where the calibration scores prompts; None where it does so by magnitudes."""
    score: Callable[[Conditioning], Sequence[float] | None] | None = None
    """Of rows, as the gate scores them; None without a calibration."""
    any_length: bool = False
    """Text of another number of tokens fits into the run."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One guided network call.

    Predictions are what the network answers: noise, v or velocity. Guidance is an affine
    combination with weights that sum to 1, so it reads the same in all of them.
    """

    index: int
    """Network calls of this run before this one."""
    percent: float
    """Share of the noise schedule that is behind, 0 at pure noise, 1 at the image."""
    x: Tensor
    """[image *latent] what the network read."""
    cond: Tensor
    """[image *latent] predicted from the prompt."""
    uncond: Tensor
    """[image *latent] predicted from the negative prompt."""
    cond_scale: float
    """1.0 is no guidance."""
    magnitude: Tensor
    """[image] |D|, L2 norm in the units of the score."""
    predict: Callable[..., Tensor]
    """One more pass of the conditional rows at this x, [image *latent]; given a `Conditioning` of
    the run's denoiser, one row per image, from that in the prompts' place."""
    to_x0: Callable[[Tensor], Tensor]
    """From a prediction at this x to the clean latents it stands for."""
    from_x0: Callable[[Tensor], Tensor]
    """The way back."""

    def guided(self, cond_scale: float | None = None) -> Tensor:
        """Return classifier-free guidance, by default with the run's own scale."""
        scale = self.cond_scale if cond_scale is None else cond_scale
        # Ho & Salimans 2022 (arXiv:2207.12598) Eq. 6 with cond_scale = 1 + w.
        return self.uncond + scale * (self.cond - self.uncond)


class Mitigation:
    """What a method does to one run; the base class changes nothing."""

    def __init__(
        self,
        *,
        cond: Conditioning | None = None,
        x: Tensor | None = None,
        changes: tuple[str, ...] = (),
    ):
        self.changes = changes
        """What stands in a prompt's place, for people, one per image; none for nothing to say."""
        self.cond = cond
        """Replaces the conditioning of the whole run, one row per image; None keeps it."""
        self.x = x
        """[image *latent] replaces the initial noise, at `Start.sigma`; None keeps it."""

    def guide(self, step: Step) -> Tensor | None:
        """Return the guided prediction [image *latent]; None leaves it to the host."""
        return None

    def close(self) -> None:
        """Undo whatever reaches beyond this object; called once, also after an error."""


class Method:
    """A way of mitigating, as configured; one object serves any number of runs."""

    name: ClassVar[str]
    needs_guidance: ClassVar[bool] = False
    """Whether it acts on guidance, so that a run without an unconditional row gains nothing."""

    def start(self, start: Start) -> Mitigation:
        """Return what to do to this run.

        Raises:
            ValueError: The run lacks what the method needs; names it.
        """
        raise NotImplementedError
