"""Whether a method acts on a prompt: decided by a calibrated score, or ordered.

The gate scores a prompt as the calibration scored its controls: from all of the calibration's own
seeds, at its own noise levels. So it opens for the prompts that an audit flags, and for no others.
The first step of the run itself would cost nothing, but schedulers start at different noise levels
and scores move with them; a threshold holds where it was calibrated.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..arrays import Float, Tensor
from ..score.calibration import Calibration, settings_of
from ..score.config import DetectionConfig
from ..score.control_basis import ControlBasis
from ..score.denoiser import Conditioning, Denoiser
from ..score.trajectory import Trajectory

MODES = ("calibrated", "always", "never")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """When a method acts on a prompt."""

    mode: str = "calibrated"
    """On prompts that score above the threshold, on every prompt, or on none."""
    calibration: Calibration | None = None
    """Of the model at hand; with it, scores are recorded in every mode. A prompt costs one network
    row per seed and step that it was calibrated with."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"The gate must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.mode == "calibrated" and self.calibration is None:
            raise ValueError(
                "A calibrated gate needs a calibration: make one for this model with `unmemorize "
                "calibrate` and give it as `calibration`, or set the gate to 'always'."
            )

    @property
    def threshold(self) -> float | None:
        """Return what the scores of prompts are compared with; None without a calibration."""
        return None if self.calibration is None else self.calibration.judge.threshold

    @property
    def config(self) -> DetectionConfig:
        """Return what the calibration measured; without one, what detection does by default."""
        if self.calibration is None:
            return DetectionConfig()
        settings = self.calibration.judge.settings
        config = DetectionConfig(
            seeds=tuple(settings["seeds"]),
            steps=settings["steps"],
            schedule_steps=settings["schedule_steps"],
        )
        scale = settings["cond_scale"]  # None where guidance does not matter
        return config if scale is None else replace(config, cond_scale=scale)

    def check(self, denoiser: Denoiser, *, model: str | None = None, force: bool = False) -> str:
        """Make sure that the calibration fits, and return a caveat when it does not but may.

        Args:
            denoiser: The network, at the calibration's resolution.
            model: Sha256 of its weights; None takes the calibration's word for the model.
            force: Go on all the same.

        Raises:
            CalibrationMismatch: It does not fit; names every differing field.
        """
        if self.calibration is None:
            return ""
        judge = self.calibration.judge
        now = settings_of(denoiser, self.config, judge.settings.get("told"))
        return judge.check(judge.model if model is None else model, now, force=force)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The gate's decision about one row."""

    fired: bool
    """The method acts."""
    score: float | None
    """Of the prompt, as the calibration scores; None without one."""


@dataclass(frozen=True, kw_only=True)
class GuardedImage:
    """One image of a run: what was decided and measured."""

    prompt: str | None
    """None when embeddings were given instead."""
    fired: bool
    """The method acted on this image."""
    threshold: float | None
    """Of the gate; None without a calibration."""
    score_before: float | None
    """Of the prompt, as the gate scores it; None without a calibration."""
    score_after: float | None = None
    """Of the conditioning that the method put in the prompt's place. None where it left that alone:
    a method that acts on steps or on the noise does not change what a prompt scores."""
    noise_before: float | None = None
    """|D| at this image's own initial noise, brought to the level that the gate scores at, when the
    method replaced it. Of one noise, so not to be compared with the threshold."""
    noise_after: float | None = None
    """|D| at the noise the method put in its place, with the conditioning of the run."""
    method: str | None = None
    """Name of the method; None when it did not act."""
    change: str = ""
    """What the method put in the prompt's place, for people; "" where it says nothing of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredNoises:
    """Where a residual scores prompts: its starting noises, and the levels that are told."""

    denoiser: Denoiser
    """The network at the calibration's size."""
    basis: ControlBasis
    """Of the controls, on the network's device."""
    told: tuple[int, ...]
    """[seed] Step of the schedule; noises of one step share a pass."""
    sigmas: Float[Tensor, " seed"]
    """Levels that the network is told."""
    x: Float[Tensor, " seed *latent"]
    """Pure noise."""
    x0_uncond: Float[Tensor, " seed *latent"]
    """Predicted from the empty prompt."""


class AppliedGate:
    """A gate applied to one model, which must stay as it is; no prompt is scored twice."""

    def __init__(self, gate: Gate, denoiser: Denoiser):
        self.gate, self.denoiser = gate, denoiser
        self.sigma = denoiser.sigmas(gate.config.schedule_steps)[0]
        """Noise level of the first measured step."""
        self._trajectory: Trajectory | None = None
        self._noises: ScoredNoises | None = None
        self._scores: dict[bytes, float] = {}

    def decide(self, cond: Conditioning, prompts: Sequence[str] = ()) -> tuple[Decision, ...]:
        """Return what to do, one decision per row.

        Args:
            cond: As the network reads it; rows that repeat are scored once.
            prompts: Where known, one per row, to name them in errors.

        Raises:
            PredictionError: A prediction is NaN or infinite; names the prompt.
        """
        mode, threshold = self.gate.mode, self.gate.threshold
        scores = self.scores(cond, prompts)
        if scores is None or threshold is None:
            return (Decision(fired=mode == "always", score=None),) * len(cond)
        return tuple(
            Decision(fired=mode == "always" or (mode == "calibrated" and s > threshold), score=s)
            for s in scores
        )

    def scores(self, cond: Conditioning, prompts: Sequence[str] = ()) -> tuple[float, ...] | None:
        """Return the score of each row, as the calibration scores; None if not calibrated."""
        if self.gate.calibration is None:
            return None
        keys = [content_of(cond, row) for row in range(len(cond))]
        new = {key: row for row, key in enumerate(keys) if key not in self._scores}
        if new:
            rows, seeds = list(new.values()), len(self.gate.config.seeds)
            texts = prompts or ["given as embeddings"] * len(cond)
            every = [row for row in rows for _ in range(seeds)]
            traces = self._prepared(self.gate.calibration).traces(
                texts, cond, every, [*range(seeds)] * len(rows)
            )
            means = traces.mean(1).view(len(rows), seeds).mean(1)
            self._scores.update(zip(new, means.tolist(), strict=True))
        return tuple(self._scores[key] for key in keys)

    def noises(self) -> ScoredNoises | None:
        """Return where prompts are scored, in tensors that autograd accepts; None of magnitudes.

        Called outside inference mode. It computes nothing if a prompt was scored before.
        """
        calibration = self.gate.calibration
        if calibration is None or calibration.judge.basis is None:
            return None
        if self._noises is None:
            prepared = self._prepared(calibration)
            assert prepared.basis is not None  # the calibration's
            basis = replace(
                prepared.basis,
                mean=_normal(prepared.basis.mean), directions=_normal(prepared.basis.directions),
            )  # fmt: skip
            self._noises = ScoredNoises(
                denoiser=self.denoiser,
                basis=basis,
                told=prepared.told,
                sigmas=_normal(prepared.sigmas[list(prepared.told)]),
                x=_normal(prepared.noise),
                x0_uncond=_normal(prepared.x0_uncond),
            )
        return self._noises

    def _prepared(self, calibration: Calibration) -> Trajectory:
        """Return what all scores share, computed with the first."""
        if self._trajectory is None:
            self._trajectory = Trajectory(self.denoiser, self.gate.config, calibration.judge.basis)
        return self._trajectory


def _normal(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd may save."""
    return tensor.clone() if tensor.is_inference() else tensor


def content_of(cond: Conditioning, row: int) -> bytes:
    """Return what tells one row's values from another's."""
    digest = hashlib.sha256()
    whole = [cond.embeddings, cond.pooled]
    own = [tensor[row] for tensor in whole if tensor is not None]
    for value in cond.others[row].values() if cond.others else ():
        own += value if isinstance(value, list) else [value]
    for tensor in own:
        if tensor is not None:
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.view(torch.uint8).numpy())
    return digest.digest()
