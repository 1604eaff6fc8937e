"""Detection by magnitude: how strongly a prompt alone steers the first denoising steps.

Wen et al., ICLR 2024, arXiv:2407.21720. At the first step x depends on the seed alone, so the
unconditional prediction is computed once per seed and shared by all prompts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..arrays import Float, Tensor
from .clips import DIMENSIONS, ClipNorms
from .config import DetectionConfig
from .control_basis import ControlBasis
from .denoiser import Denoiser
from .metrics import per_element
from .trajectory import PredictionError, Trajectory, encode

__all__ = ["Detection", "DetectionConfig", "PredictionError", "detect", "mean_over_seeds"]

OnResult = Callable[[int, Tensor], None]
Progress = Callable[[int], object]

ENCODED_AT_ONCE = 16
"""Prompts whose embeddings are held at the same time, at least."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Detection:
    """Scores of a set of prompts, in the order they were given."""

    prompts: tuple[str, ...]
    traces: Float[Tensor, " prompt seed step"]
    """|D|, L2 norm in latent units, or of one step the score that a `ControlBasis` gives (1 for an
    ordinary prompt), float64 on the CPU; NaN for seeds a sequential run did not draw."""
    latent_elements: int
    """Number of elements of one latent."""
    config: DetectionConfig
    seed_levels: Float[Tensor, " seed"] | None = None
    """Median score of the controls at each seed; levels the scores where seeds were not drawn."""
    clips: ClipNorms | None = None
    """Of magnitudes of a model of videos, their parts [prompt seed step]: of every frame, of what
    all frames share (content) and of the rest (motion); float64 on the CPU, NaN for prompts whose
    trace was known. None for images, for residuals and for sequential runs."""

    @property
    def scores(self) -> Float[Tensor, " prompt"]:
        """Return the means of `traces` over seeds and steps (>= 0)."""
        return mean_over_seeds(self.traces.mean(2), self.seed_levels)

    @property
    def scores_per_element(self) -> Float[Tensor, " prompt"]:
        """Return magnitudes as root mean square, which does not move with resolution."""
        return per_element(self.scores, (self.latent_elements,))

    @property
    def seeds_drawn(self) -> Tensor:
        """Return how many seeds each prompt was given, [prompt]."""
        return (~self.traces[..., 0].isnan()).sum(1)


def mean_over_seeds(
    scores: Float[Tensor, " prompt seed"], seed_levels: Float[Tensor, " seed"] | None = None
) -> Float[Tensor, " prompt"]:
    """Return the mean over seeds, estimated where some are NaN because they were not drawn.

    Some starting noises give every prompt a larger score. The ratio estimator takes that out:
    mean of the drawn * (level of all seeds / level of the drawn ones). Without NaN it is the mean.
    """
    drawn = ~scores.isnan()
    mean = scores.nanmean(1)
    if seed_levels is None:
        return mean
    level = (drawn * seed_levels).sum(1) / drawn.sum(1)
    return torch.where(drawn.all(1), mean, mean * (seed_levels.mean() / level))


def detect(
    denoiser: Denoiser,
    prompts: Sequence[str],
    config: DetectionConfig | None = None,
    *,
    basis: ControlBasis | None = None,
    known: Mapping[int, Tensor] | None = None,
    on_result: OnResult | None = None,
    on_difference: OnResult | None = None,
    on_clip: OnResult | None = None,
    progress: Progress | None = None,
) -> Detection:
    """Score prompts by the magnitude of the text-conditional prediction, or outside of a basis.

    A score depends on its prompt alone, to float tolerance: not on batch size, order or the others.
    Forward rows for one step: prompts * seeds + seeds. Only the traces of all prompts are held.

    Args:
        denoiser: The network.
        prompts: Any strings; kept in order, duplicates included.
        config: What to measure.
        basis: Of the controls, at the config's seeds: the scores are those that it gives.
        known: Traces [seed step] by index, of an interrupted run. Batches are cut as if nothing was
            known, so that the rest comes out bit for bit as in a run that was not interrupted.
        on_result: Called once per prompt that was not known, with its index and trace [seed step].
        on_difference: Called before it with the index and D of the first step [seed element],
            float32 on the CPU, from the same forward passes.
        on_clip: Called before it with the index and the packed `ClipNorms` [seed step part], where
            `Detection.clips` has them.
        progress: Called with the number of prompts finished since the last call.

    Raises:
        PredictionError: A prediction is NaN or infinite; names the prompt.
    """
    config, known = config or DetectionConfig(), known or {}
    trajectory, seeds = Trajectory(denoiser, config, basis), len(config.seeds)
    # As many prompts as fill a pass of each told level.
    at_once = max(1, trajectory.rows * len(set(trajectory.told)) // seeds)
    chunk = at_once * math.ceil(ENCODED_AT_ONCE / at_once)
    traces = torch.full((len(prompts), seeds, config.steps), torch.nan, dtype=torch.float64)
    clips = None
    if len(denoiser.latent_shape) == DIMENSIONS and basis is None:
        clips = traces.new_full((*traces.shape, denoiser.latent_shape[1] + 2), torch.nan)
    for start in range(0, len(prompts), chunk):
        texts, cond = prompts[start : start + chunk], None
        for first in range(0, len(texts), at_once):
            part = range(first, min(first + at_once, len(texts)))
            if not all(start + i in known for i in part):
                cond = encode(denoiser, texts) if cond is None else cond
                prompt_of_row = [i for i in part for _ in range(seeds)]
                differences: list[Tensor] | None = None if on_difference is None else []
                parts: list[Tensor] | None = None if clips is None else []
                rows = trajectory.traces(
                    texts, cond, prompt_of_row, [*range(seeds)] * len(part), differences, parts
                )
                traces[[start + i for i in part]] = rows.view(len(part), seeds, -1)
                new = [i for i in part if start + i not in known]
                for take, kept in ((on_difference, differences), (on_clip, parts)):
                    if take is not None and kept is not None:
                        own = torch.cat(kept).split(seeds)
                        for i in new:
                            take(start + i, own[i - first].clone())
                if clips is not None and parts is not None:
                    own = torch.cat(parts).split(seeds)
                    for i in new:
                        clips[start + i] = own[i - first]
            emit([start + i for i in part], traces, known, on_result)
            if progress is not None:
                progress(len(part))
    return Detection(
        prompts=tuple(prompts),
        traces=traces,
        latent_elements=math.prod(denoiser.latent_shape),
        config=config,
        clips=None if clips is None else ClipNorms.unpacked(clips),
    )


def control_differences(
    denoiser: Denoiser,
    prompts: Sequence[str],
    config: DetectionConfig,
    told: Sequence[int],
    *,
    known: Mapping[int, Tensor] | None = None,
    on_result: OnResult | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, " seed prompt element"]:
    """Return D of prompts at told levels, float32 on the CPU: what a `ControlBasis` is made of.

    Args:
        denoiser: The network.
        prompts: The controls, or prompts whose D is looked at outside of theirs.
        config: Gives the seeds.
        told: Steps of the schedule, one a seed: the network is told its level and reads pure
            noise.
        known: D [seed element] by index, of an interrupted run.
        on_result: Called once per prompt that was not known, with its index and D [seed element].
        progress: Called with the number of prompts finished since the last call.

    Raises:
        PredictionError: A prediction is NaN or infinite; names the prompt.
    """
    trajectory, known = Trajectory(denoiser, config, told=told), known or {}
    seeds, elements = len(config.seeds), math.prod(denoiser.latent_shape)
    result = torch.empty(seeds, len(prompts), elements)
    for start in range(0, len(prompts), ENCODED_AT_ONCE):
        texts = prompts[start : start + ENCODED_AT_ONCE]
        indices = range(start, start + len(texts))
        if not all(index in known for index in indices):
            prompt_of_row = [i for i in range(len(texts)) for _ in range(seeds)]
            rows = trajectory.differences(
                texts, encode(denoiser, texts), prompt_of_row, [*range(seeds)] * len(texts)
            )
            result[:, start : start + len(texts)] = rows.view(len(texts), seeds, -1).swapaxes(0, 1)
        for index in indices:
            if index in known:
                result[:, index] = known[index]
            elif on_result is not None:
                on_result(index, result[:, index].clone())
        if progress is not None:
            progress(len(texts))
    return result


def emit(
    indices: Sequence[int],
    traces: Float[Tensor, " prompt seed step"],
    known: Mapping[int, Tensor],
    on_result: OnResult | None,
) -> None:
    """Put what was known into `traces`, and hand over each trace that is new."""
    for index in indices:
        if index in known:
            traces[index] = torch.as_tensor(known[index], dtype=torch.float64)
        elif on_result is not None:
            on_result(index, traces[index].clone())
