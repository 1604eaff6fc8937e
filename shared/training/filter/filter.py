"""Samples that are being memorized, left out of the loss.

Wen et al., ICLR 2024, arXiv:2407.21720: where the text moves the prediction too far, the sample
is being memorized. The adapter runs its network once more, on the empty prompt and otherwise the
same input, inside `replay.aside`; everything else happens here.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

from ...arrays import Float, Tensor
from ...score.metrics import per_element, text_noise_norm
from ...wording import name_some
from .expectation import Expectation, Recall, Visits
from .sample_log import Record, Sample, SampleLog
from .thresholds import Threshold
from .watch import Watch

logger = logging.getLogger(__name__)

Action = Literal["drop", "downweight", "log"]
Gather = Callable[[Tensor], Tensor]
"""Takes this process's [sample column], float64 on the CPU, and returns those of all processes
joined along the first axis, in the same order in every process."""
COUNTS = ("calls", "seen", "measured", "flagged")
"""Attributes of a filter that a resumed training goes on counting."""
REMEMBERING = ("threshold", "expectation", "recall", "watch")
"""Attributes with a state of their own."""


def alone(values: Tensor) -> Tensor:
    """Gather in a training of one process."""
    return values


class MemorizationFilter:
    """Weights for the loss of each sample, decided by its text-conditional magnitude."""

    def __init__(
        self,
        threshold: Threshold,
        *,
        action: Action = "drop",
        log: SampleLog | None = None,
        gather: Gather = alone,
        expectation: Expectation | None = None,
        recall: Recall | None = None,
        watch: Watch | None = None,
    ):
        """Set up the filter.

        Args:
            threshold: A sample at or above it is being memorized. Scores are RMS per latent
                element, which holds for every resolution; the paper's L2 norm grows with it.
            action: "drop" leaves such samples out, "downweight" weighs them threshold / score,
                "log" changes nothing and only records.
            log: Where each decision is written, one file per process.
            gather: Needed with several processes, whose batches must be of one size.
            expectation: Predicts scores, for a relative threshold and for `recall`; it learns the
                samples of all processes. None makes one where it is needed.
            recall: Skips the extra pass on most visits; None measures every visit.
            watch: Learns the records, and says which images are being memorized.
        """
        if action not in get_args(Action):
            raise ValueError(f"`action` must be one of {get_args(Action)}, got {action!r}.")
        self.threshold, self.action = threshold, action
        self.log, self.gather, self.recall, self.watch = log, gather, recall, watch
        needed = threshold.relative or recall is not None
        self.expectation = (expectation or Expectation()) if needed else None
        self.calls = self.seen = self.measured = self.flagged = 0
        """Calls of `weigh`; over all processes the samples seen, those whose score was measured,
        not expected, and those at or above the threshold."""
        self.draws = False
        """Whether the network was seen to draw random numbers, as dropout does."""
        self.latest = 0.0
        """Mean score of the last call, over all processes."""

    def due(self, samples: Sequence[Sample], timesteps: Tensor) -> Tensor:
        """Return which samples of a step need the extra pass, [sample] of booleans."""
        if self.recall is None:
            return torch.ones(len(samples), dtype=torch.bool)
        return self._due(Visits.of(samples, timesteps))

    @torch.no_grad()
    def weigh(
        self,
        cond: Float[Tensor, " sample *latent"],
        uncond: Float[Tensor, " due *latent"],
        *,
        timesteps: Tensor,
        samples: Sequence[Sample],
        scale: Float[Tensor, " sample"] | None = None,
    ) -> Float[Tensor, " sample"]:
        """Return what to multiply each sample's loss by before the mean over the batch.

        Weights are normalised over all processes: the mean of weighted losses is the mean over
        the samples that remain. When none remains they are 0, and the backward pass still runs,
        which keeps processes in step. Under gradient accumulation each call is a batch of its own.

        Args:
            cond: The network's output in training, noise or velocity.
            uncond: On the empty prompt, otherwise the same input; of the samples that are `due`,
                or of all, which measures them all.
            timesteps: [sample], integer or not, in the units of the threshold's bins.
            samples: Their files and captions.
            scale: Factor per sample from output to noise; None is 1. For v-prediction it is
                sqrt(abar), for x0-prediction 1 / sigma.
        """
        if len(samples) != len(cond):
            raise ValueError(f"`samples` must name all {len(cond)}, got {len(samples)}.")
        visits = Visits.of(samples, timesteps)
        due = self._due(visits)
        if len(uncond) == len(cond):
            due = torch.ones_like(due)
        elif len(uncond) != due.sum():
            raise ValueError(f"`uncond` must hold the {int(due.sum())} due, got {len(uncond)}.")
        scores = self._expected(visits).scores
        scores[due] = self._measured(cond.detach(), uncond, due, scale)
        own = visits._replace(scores=scores, measured=due.double())
        everyone = Visits.from_table(self.gather(own.table()))
        if self.expectation is not None:
            self.expectation.learn(everyone)  # a relative threshold judges with this visit in it
        limits, judged = self.threshold.at(own.timesteps), self._judged(own)
        limits_of_all, judged_of_all = self.threshold.at(everyone.timesteps), self._judged(everyone)
        remaining = self._remaining(judged, limits)
        total = self._remaining(judged_of_all, limits_of_all).sum()
        self._record(own, judged >= limits, remaining, samples)
        self._learn(everyone, judged_of_all >= limits_of_all)
        weights = remaining * len(everyone.scores) / total if total else remaining
        return weights.to(cond.device, torch.promote_types(cond.dtype, torch.float32))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, plain data."""
        counts = {name: getattr(self, name) for name in COUNTS}
        parts = {name: getattr(self, name).state_dict() for name in self._parts()}
        return counts | {"draws": self.draws} | parts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; records of repeated steps replace the old ones."""
        for name in COUNTS:
            setattr(self, name, state[name])
        self.draws = state.get("draws", True)  # unknown in an older version: the safe answer
        for name in self._parts():
            if name in state:  # absent where the other run had no need of it
                getattr(self, name).load_state_dict(state[name])

    def _due(self, visits: Visits) -> Tensor:
        """Return which visits need the extra pass, [sample] of booleans."""
        if self.recall is None:
            return torch.ones(len(visits.scores), dtype=torch.bool)
        limits, tail = (of(visits.timesteps) for of in (self.threshold.at, self.threshold.tail))
        return self.recall.due(visits, self._judged(self._expected(visits)), limits, tail)

    def _expected(self, visits: Visits) -> Visits:
        """Return the visits with their expected scores, where some visits may be skipped."""
        if self.recall is None:
            return visits
        assert self.expectation is not None
        return visits._replace(scores=self.expectation.scores(visits))

    def _judged(self, visits: Visits) -> Float[Tensor, " sample"]:
        """Return what the threshold is compared with."""
        if not self.threshold.relative:
            return visits.scores
        assert self.expectation is not None
        return self.expectation.ratios(visits)

    def _measured(
        self, cond: Tensor, uncond: Tensor, due: Tensor, scale: Tensor | None
    ) -> Float[Tensor, " due"]:
        """Return the scores of the samples that are due."""
        ours = cond if due.all() else cond[due.to(cond.device)]
        return scores_of(ours, uncond, None if scale is None else scale[due.to(scale.device)])

    def _learn(self, everyone: Visits, flagged: Tensor) -> None:
        """Count the samples of all processes, and learn their scores."""
        self.calls += 1
        self.seen += len(flagged)
        self.measured += int(everyone.measured.sum())
        self.flagged += int(flagged.sum())
        self.latest = float(everyone.scores.mean())
        self.threshold.learn(everyone.timesteps, everyone.scores)
        if self.recall is not None:
            self.recall.learn(everyone)

    def _remaining(self, judged: Tensor, limits: Tensor) -> Float[Tensor, " sample"]:
        """Return the share of each sample that stays in the loss, 0 to 1."""
        if self.action == "log":
            return torch.ones_like(judged)
        over = judged >= limits
        reduced = limits / judged if self.action == "downweight" else torch.zeros_like(judged)
        return torch.where(over & (judged > 0), reduced, (~over).to(judged.dtype))

    def _record(
        self, own: Visits, flagged: Tensor, remaining: Tensor, samples: Sequence[Sample]
    ) -> None:
        if self.log is None:
            return
        columns = (own.timesteps, own.scores, own.measured.bool(), flagged, remaining)
        rows = zip(samples, *(column.tolist() for column in columns), strict=True)
        records = [
            Record(sample=sample, timestep=timestep, score=score, measured=measured,
                   flagged=over, kept=kept)
            for sample, timestep, score, measured, over, kept in rows
        ]  # fmt: skip
        self.log.add(self.calls, records)
        if self.watch is not None and (new := self.watch.learn(self.calls, records)):
            logger.warning(
                "From batch %d on %s being memorized: %s. %d of the training's images are.",
                self.calls, "this image is" if len(new) == 1 else "these images are",
                name_some(new), len(self.watch.since),
            )  # fmt: skip

    def _parts(self) -> list[str]:
        """Return the names of the attributes that remember something."""
        return [name for name in REMEMBERING if getattr(self, name) is not None]


def scores_of(
    cond: Float[Tensor, " sample *latent"],
    uncond: Float[Tensor, " sample *latent"],
    scale: Float[Tensor, " sample"] | None,
) -> Float[Tensor, " sample"]:
    """Return the scores of predictions with the captions and with the empty prompt, float64."""
    # The CPU decides: the same numbers on every device, and no half precision.
    scores = per_element(text_noise_norm(cond, uncond).cpu().double(), cond.shape[1:])
    return scores if scale is None else scores * scale.cpu().double()


def scale_gradient(
    prediction: Float[Tensor, " sample *latent"], weights: Float[Tensor, " sample"]
) -> Float[Tensor, " sample *latent"]:
    """Return the prediction with the gradient of each sample multiplied by its weight.

    For trainers that give no access to the loss of a sample: whatever loss they compute shows its
    usual value, and learns only from what remains.
    """
    if bool((weights == 1).all()):
        return prediction  # the same tensor: not one operation is added to the training
    fixed = prediction.detach()
    scale = weights.to(prediction.dtype).view(-1, *(1,) * (prediction.ndim - 1))
    return fixed + scale * (prediction - fixed)
