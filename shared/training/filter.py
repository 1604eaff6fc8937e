"""Samples that are being memorized, left out of the loss.

Wen et al., ICLR 2024, arXiv:2407.21720: where the text moves the prediction too far, the sample
is being memorized. The adapter runs its network once more, on the empty prompt and otherwise the
same input, inside `replay.aside`; everything else happens here.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

from ..arrays import Float, Tensor
from ..metrics import per_element, text_noise_norm
from .recall import Recall, identities
from .sample_log import Record, Sample, SampleLog
from .thresholds import Threshold

Action = Literal["drop", "downweight", "log"]
Unit = Literal["rms", "l2"]
Gather = Callable[[Tensor], Tensor]
"""From this process's [sample column], float64 on the CPU, to that of all, one order everywhere."""
COUNTS = ("calls", "seen", "measured", "flagged")
"""Attributes of a filter that a resumed training goes on counting."""


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
        unit: Unit = "rms",
        log: SampleLog | None = None,
        gather: Gather = alone,
        recall: Recall | None = None,
    ):
        """Set up the filter.

        Args:
            threshold: Samples at or above it are being memorized.
            action: "drop" leaves them out, "downweight" weighs them threshold / score, "log"
                changes nothing and only records.
            unit: Of score and threshold: "rms" per latent element, which holds for every
                resolution, or "l2", the paper's norm, which grows with it.
            log: Where each decision is written, one file per process.
            gather: Needed with several processes, whose batches must be of one size.
            recall: Leaves out the extra pass on most visits; None measures always. Every process
                remembers the samples of all.
        """
        for name, value, known in (("action", action, Action), ("unit", unit, Unit)):
            if value not in get_args(known):
                raise ValueError(f"`{name}` must be one of {get_args(known)}, got {value!r}.")
        self.threshold, self.action, self.unit = threshold, action, unit
        self.log, self.gather, self.recall = log, gather, recall
        self.calls = self.seen = self.measured = self.flagged = 0
        """Calls of `weigh`; over all processes the samples seen, those of them whose score was
        measured and not expected, and those at or above threshold."""
        self.draws = False
        """Whether the network was seen to draw random numbers, as dropout does."""
        self.latest = 0.0
        """Mean score of the last call, over all processes."""

    def due(self, samples: Sequence[Sample], timesteps: Tensor) -> Tensor:
        """Return which samples of a step need the extra pass, [sample] of booleans."""
        if self.recall is None:
            return torch.ones(len(samples), dtype=torch.bool)
        places = timesteps.cpu().double()
        return self.recall.due(identities(samples), places, self.threshold.at(places))

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
            uncond: On the empty prompt, otherwise the same input; of those that are `due`, or of
                all, which then are all measured.
            timesteps: [sample], integer or not, in the units of the threshold's bins.
            samples: Which they are.
            scale: Factor per sample from output to noise; None is 1. For v-prediction it is
                sqrt(abar), for x0-prediction 1 / sigma.
        """
        if len(samples) != len(cond):
            raise ValueError(f"`samples` must name all {len(cond)}, got {len(samples)}.")
        places, who = timesteps.cpu().double(), identities(samples)
        due = self.due(samples, timesteps)
        if len(uncond) == len(cond):
            due = torch.ones_like(due)
        elif len(uncond) != due.sum():
            raise ValueError(f"`uncond` must hold the {int(due.sum())} due, got {len(uncond)}.")
        scores = torch.full_like(places, torch.nan)
        if self.recall is not None:
            scores = self.recall.expected(who, places)
        scores[due] = self._measured(cond.detach(), uncond, due, scale)
        own = torch.stack([places, scores, due.double(), who], dim=1)
        everyone = self.gather(own)
        limits = self.threshold.at(own[:, 0])
        remaining = self._remaining(own[:, 1], limits)
        limits_of_all = self.threshold.at(everyone[:, 0])
        total = self._remaining(everyone[:, 1], limits_of_all).sum()
        self._record(own, limits, remaining, samples)
        self._learn(everyone, limits_of_all)
        weights = remaining * len(everyone) / total if total else remaining
        return weights.to(cond.device, torch.promote_types(cond.dtype, torch.float32))

    def _measured(
        self, cond: Tensor, uncond: Tensor, due: Tensor, scale: Tensor | None
    ) -> Float[Tensor, " due"]:
        """Return the scores of the samples that are due."""
        ours = cond if due.all() else cond[due.to(cond.device)]
        # The CPU decides: the same numbers on every device, and no half precision.
        scores = text_noise_norm(ours, uncond).cpu().double()
        scores = per_element(scores, cond.shape[1:]) if self.unit == "rms" else scores
        return scores if scale is None else scores * scale.cpu().double()[due]

    def _learn(self, everyone: Tensor, limits: Tensor) -> None:
        """Count the samples of all processes, and remember their scores."""
        timesteps, scores, measured, who = everyone.unbind(1)
        self.calls += 1
        self.seen += len(everyone)
        self.measured += int(measured.sum())
        self.flagged += int((scores >= limits).sum())
        self.latest = float(scores.mean())
        self.threshold.learn(timesteps, scores)
        if self.recall is not None:
            self.recall.learn(who, timesteps, scores, measured.bool())

    def _remaining(self, scores: Tensor, limits: Tensor) -> Float[Tensor, " sample"]:
        """Return the share of each sample that stays in the loss, 0 to 1."""
        if self.action == "log":
            return torch.ones_like(scores)
        over = scores >= limits
        reduced = limits / scores if self.action == "downweight" else torch.zeros_like(scores)
        return torch.where(over & (scores > 0), reduced, (~over).to(scores.dtype))

    def _record(
        self, own: Tensor, limits: Tensor, remaining: Tensor, samples: Sequence[Sample]
    ) -> None:
        if self.log is None:
            return
        rows = zip(samples, own.tolist(), (own[:, 1] >= limits).tolist(), remaining.tolist(),
                   strict=True)  # fmt: skip
        self.log.add(self.calls, [
            Record(sample=sample, timestep=timestep, score=score, measured=bool(measured),
                   flagged=flagged, kept=kept)
            for sample, (timestep, score, measured, _), flagged, kept in rows
        ])  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, plain data."""
        counts = {name: getattr(self, name) for name in COUNTS}
        recalled = {} if self.recall is None else {"recall": self.recall.state_dict()}
        told = {"draws": self.draws, "threshold": self.threshold.state_dict()}
        return counts | told | recalled

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; records of steps done again replace the old ones."""
        for name in COUNTS:
            setattr(self, name, state[name])
        self.draws = state.get("draws", True)  # an older version did not say: to be safe
        self.threshold.load_state_dict(state["threshold"])
        if self.recall is not None and "recall" in state:
            self.recall.load_state_dict(state["recall"])


def gate_gradient(
    prediction: Float[Tensor, " sample *latent"], weights: Float[Tensor, " sample"]
) -> Float[Tensor, " sample *latent"]:
    """Return the prediction with the gradient of each sample multiplied by its weight.

    For trainers that give no access to the loss of a sample: whatever loss they compute shows its
    usual value, and learns only from what remains.
    """
    if bool((weights == 1).all()):
        return prediction  # the same tensor: not one operation is added to the training
    fixed = prediction.detach()
    gate = weights.to(prediction.dtype).view(-1, *(1,) * (prediction.ndim - 1))
    return fixed + gate * (prediction - fixed)
