"""Calibration: what scores of ordinary prompts look like on this very model, and verdicts from it.

It holds for prompts exchangeable with the controls. Thresholds do not transfer between models,
dtypes, resolutions or settings, so a calibration is bound to them.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..arrays import Float, Tensor
from .calibration_file import (
    AGAIN,
    BESIDE,
    SCHEMA_VERSION,
    CalibrationError,
    Stored,
    bases_as_bytes,
    read_calibration,
    write_calibration,
)
from .collapse import SecondStage
from .config import CLIP_PARTS, DetectionConfig
from .control_basis import ControlBasis, directions_for, fit_controls, require_direction
from .denoiser import Denoiser
from .detection import Detection
from .families import cosine_limit
from .pooled_basis import pooled
from .rates import clopper_pearson, threshold_of

OBSERVED = "observed."
HIGH = 0.05
"""Share of controls that score as high as prompts of another kind commonly do."""
FEWEST = 10
"""Prompts whose middle one says something of their kind."""
RESOLVED = 0.05
"""q-value that controls should be enough for."""


class CalibrationMismatch(ValueError):
    """A calibration made on another model or with other settings."""


def settings_of(
    denoiser: Denoiser, config: DetectionConfig, told: Sequence[int] | None = None
) -> dict:
    """Return everything besides the weights that moves a score, as plain JSON values.

    Args:
        denoiser: The network.
        config: What is measured.
        told: Of a residual score, the steps of the schedule that the network is told, one a seed.
    """
    levels = denoiser.sigmas(config.schedule_steps).tolist()
    levels = levels[: config.steps] if told is None else [levels[step] for step in told]
    residual = {} if told is None else {"score": "residual", "told": list(told)}
    return residual | {
        "parametrization": denoiser.parametrization,
        "latent_shape": list(denoiser.latent_shape),
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "seeds": list(config.seeds),
        "steps": config.steps,
        "schedule_steps": config.schedule_steps,
        # Schedulers of one model may begin at different levels.
        "sigmas": [float(f"{level:.5g}") for level in levels],
        # The first step is measured before guidance acts.
        "cond_scale": config.cond_scale if config.steps > 1 else None,
    }


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Scores of control prompts on one model with one group of settings, and a threshold."""

    model: str
    """Sha256 of the weights, LoRA included."""
    settings: dict
    """From `settings_of`."""
    controls: str
    """Name of the list of control prompts."""
    controls_sha256: str
    """Of the prompts as a JSON list."""
    control_scores: tuple[tuple[float, ...], ...]
    """[control seed], mean over steps: L2 norm in latent units; of a residual 1 where ordinary."""
    false_positive_rate: float
    """Highest share of ordinary prompts that may be flagged, in expectation, 0..1."""
    threshold: float
    """Scores above it are flagged."""
    interval: tuple[float, float]
    """Clopper-Pearson, 95 %, of the realised false-positive rate."""
    residual: "Calibration | None" = None
    """Of the residual score, from the same controls; prompts are judged by it where it is there."""
    observed: "Calibration | None" = None
    """Of the residual at the first level of a sampler, at any starting noise, from the same
    controls: sampled images are judged by it. None with one seed, with several steps, of magnitudes
    alone, and of files from before there was one."""
    content: "Calibration | None" = None
    """Of the part of the magnitude that all frames of a clip share, from the same controls; None
    for images, and in files from before there was one."""
    motion: "Calibration | None" = None
    """Of the rest of the magnitude, in which the frames of a clip differ; None as `content` is."""
    basis: ControlBasis | None = field(default=None, compare=False)
    """What the scores are residuals outside of; None for scores that are magnitudes."""
    second: SecondStage | None = None
    """How suspicious prompts are judged where they are sampled as well."""
    family_cosine: float | None = None
    """Cosine above which the residual D of two prompts are related, see `families`; None for
    magnitudes, and with too few controls."""
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def from_controls(
        cls,
        detection: Detection,
        *,
        model: str,
        settings: dict,
        name: str,
        false_positive_rate: float = 0.01,
    ) -> "Calibration":
        """Return the calibration that the controls' scores support.

        The threshold is the order statistic of rank ceil((n + 1) * (1 - rate)), so that a further
        control is flagged with probability at most `false_positive_rate`, exactly when its
        p-value is at most that.

        Args:
            detection: Of the controls, with all seeds drawn.
            model: Sha256 of the weights.
            settings: From `settings_of`.
            name: Of the list of controls, for people.
            false_positive_rate: Above 0, below 1.

        Raises:
            NotEnoughControls: The number of controls cannot support the rate.
            ValueError: The rate is out of range, or seeds were not drawn.
        """
        seed_scores = detection.traces.mean(2)
        if not seed_scores.isfinite().all():
            raise ValueError("Controls need a score for every seed; got NaN. Use `detect`.")
        made = cls(
            model=model,
            settings=settings,
            controls=name,
            controls_sha256=prompts_sha256(detection.prompts),
            false_positive_rate=false_positive_rate,
            **_supported(seed_scores, false_positive_rate),
        )
        if detection.clips is None:
            return made
        parts: dict[str, Any] = {
            name: replace(
                made,
                settings={"score": name} | settings,
                **_supported(getattr(detection.clips, name).mean(2), false_positive_rate),
            )
            for name in CLIP_PARTS
        }
        return replace(made, **parts)

    @classmethod
    def of_residual(
        cls,
        differences: Float[Tensor, " seed control element"],
        prompts: Sequence[str],
        *,
        model: str,
        settings: dict,
        name: str,
        false_positive_rate: float = 0.01,
    ) -> "Calibration":
        """Return the calibration of the residual score alone.

        Args:
            differences: D of the controls, as `control_differences` returns it.
            prompts: The controls.
            model: Sha256 of the weights.
            settings: From `settings_of`, with the steps that the network was told.
            name: Of the list of controls, for people.
            false_positive_rate: Above 0, below 1.

        Raises:
            NotEnoughControls: The number of controls cannot support the rate.
        """
        return cls(
            model=model,
            controls=name,
            controls_sha256=prompts_sha256(prompts),
            false_positive_rate=false_positive_rate,
            **_of_residual(differences, settings, false_positive_rate),
        )

    def with_residual(
        self, differences: Float[Tensor, " seed control element"], settings: dict
    ) -> "Calibration":
        """Return this calibration with one of the residual score beside it.

        Args:
            differences: D of the same controls, as `control_differences` returns it.
            settings: From `settings_of`, with the steps that the network was told.

        Raises:
            NotEnoughControls: They carry no direction.
        """
        fields = _of_residual(differences, settings, self.false_positive_rate)
        return replace(self, residual=replace(self._alone(), **fields))

    def with_observed(self, differences: Float[Tensor, " seed control element"]) -> "Calibration":
        """Return this calibration with one for sampled images beside it; of one seed, itself.

        An image is one starting noise, which the controls did not have, and under some noises all
        prompts score higher than under others. So each control counts once, by the highest of its
        scores over the seeds: the rate then holds for any of these noises, and their number is that
        of the controls, which is what is independent.

        Args:
            differences: D of the same controls at the first step of the schedule, where the
                magnitudes were measured.
        """
        if len(differences) == 1:
            return self
        basis, scores = pooled(differences)
        observed = replace(
            self._alone(),
            settings={"score": "observed residual"} | self.settings,
            basis=basis,
            **_supported(scores.amax(1, keepdim=True), self.false_positive_rate),
        )
        return replace(self, observed=observed)

    def _alone(self) -> "Calibration":
        return replace(self, residual=None, observed=None, content=None, motion=None)

    def with_second(self, collapses: Mapping[int, float]) -> "Calibration":
        """Return this calibration with the second stage of what prompts are judged by.

        Args:
            collapses: By index, of the controls that `suspicious` names.
        """
        scores = self.judge.seed_scores.nanmean(1)
        second = SecondStage.from_controls(
            scores, [collapses.get(index, math.nan) for index in range(len(scores))],
            self.false_positive_rate,
        )  # fmt: skip
        if self.residual is None:
            return replace(self, second=second)
        return replace(self, residual=replace(self.residual, second=second))

    @property
    def suspicion(self) -> float:
        """Return the score above which a second stage samples prompts."""
        return SecondStage.suspicion_of(self.seed_scores.nanmean(1), self.false_positive_rate)

    def suspicious(self, scores: Tensor | Sequence[float]) -> list[int]:
        """Return the indices of scores that a second stage samples."""
        scores = torch.as_tensor(scores, dtype=torch.float64)
        return (scores > self.suspicion).nonzero().flatten().tolist()

    @property
    def judge(self) -> "Calibration":
        """Return what prompts are judged by: the residual score's calibration if there is one."""
        return self.residual or self

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of the latents that the controls were scored at."""
        return tuple(self.settings["latent_shape"])

    @property
    def seed_scores(self) -> Float[Tensor, " control seed"]:
        """Return `control_scores` as float64."""
        return torch.tensor(self.control_scores, dtype=torch.float64)

    @property
    def sorted_scores(self) -> Float[Tensor, " control"]:
        """Return the controls' scores, smallest first."""
        return self.seed_scores.nanmean(1).sort().values

    def threshold_for(self, seeds: int) -> float:
        """Return the threshold of scores that are means over the first `seeds` seeds alone.

        The order statistic of `from_controls` at the same rate; with all seeds it is `threshold`.

        Raises:
            ValueError: The controls were not scored at so many seeds.
        """
        scores = self.seed_scores
        if not 1 <= seeds <= scores.shape[1]:
            raise ValueError(
                f"`seeds` must be between 1 and {scores.shape[1]}, the seeds of this calibration, "
                f"got {seeds}. Calibrate with more seeds to score with more."
            )
        return threshold_of(scores[:, :seeds].mean(1), self.false_positive_rate)

    def at_size(self, latent_shape: tuple[int, ...]) -> "Calibration":
        """Return the calibration of latents of another size, whose scores per element are equal."""
        if latent_shape == self.latent_shape:
            return self
        factor = math.sqrt(math.prod(latent_shape) / math.prod(self.latent_shape))
        return replace(
            self,
            settings={**self.settings, "latent_shape": list(latent_shape)},
            control_scores=tuple(
                tuple(score * factor for score in scores) for scores in self.control_scores
            ),
            threshold=self.threshold * factor,
            content=None,  # thresholds of the parts are of so many frames
            motion=None,
        )

    def p_values(
        self, scores: Tensor | Sequence[float], collapses: Sequence[float] | None = None
    ) -> Float[Tensor, " prompt"]:
        """Return per score (1 + number of controls at least as high) / (controls + 1), in 0..1.

        Args:
            scores: Of prompts.
            collapses: Of the same prompts, NaN where one was not sampled; needs a second stage.
        """
        scores, controls = torch.as_tensor(scores, dtype=torch.float64), self.sorted_scores
        at_least = len(controls) - torch.searchsorted(controls, scores.contiguous())
        values = (1 + at_least).double() / (len(controls) + 1)
        if collapses is None:
            return values
        evidence = self._evidence(scores, collapses)
        of_pair = self.require_second().p_values(evidence.nan_to_num())
        return torch.where(evidence.isnan(), values, of_pair)

    def adjusted(
        self, scores: Tensor | Sequence[float], collapses: Sequence[float] | None = None
    ) -> Float[Tensor, " prompt"]:
        """Return p-values corrected over the whole set, Benjamini & Hochberg 1995, in 0..1.

        Flagging all at most q keeps the expected share of false alarms among the flagged below q.
        Arguments as of `p_values`.
        """
        from scipy.stats import false_discovery_control

        p_values = self.p_values(scores, collapses)
        if len(p_values) == 0:
            return p_values
        return torch.from_numpy(false_discovery_control(p_values.numpy(), method="bh"))

    def coarse(
        self, scores: Tensor | Sequence[float], collapses: Sequence[float] | None = None
    ) -> str:
        """Return a caveat where `adjusted` is above `RESOLVED` for want of controls, "" elsewhere.

        No p-value is below 1 / (controls + 1). Of m prompts of which k alone have that least one,
        q is at least m / k times as much. Arguments as of `p_values`.
        """
        p_values = self.p_values(scores, collapses)
        prompts, controls = len(p_values), len(self.control_scores)
        highest = int((p_values * (controls + 1) < 1.5).sum())
        if highest == 0 or (least := self.adjusted(scores, collapses).min().item()) <= RESOLVED:
            return ""
        needed = math.ceil(prompts / (highest * RESOLVED)) - 1
        return (
            f"No q-value is below {least:.2g}: {controls} controls give no p-value below "
            f"{1 / (controls + 1):.2g}, q is corrected over {prompts} prompts, and {highest} of "
            f"them {'scores' if highest == 1 else 'score'} above all controls. {needed} controls "
            f"would resolve {RESOLVED:g}. Verdicts do not depend on q."
        )

    def flags(
        self, scores: Tensor | Sequence[float], collapses: Sequence[float] | None = None
    ) -> Tensor:
        """Return which scores, or pairs of score and collapse, lie above the threshold, [prompt].

        Arguments as of `p_values`.
        """
        scores = torch.as_tensor(scores, dtype=torch.float64)
        if collapses is None:
            return scores > self.threshold
        return self._evidence(scores, collapses) > self.require_second().threshold

    def unlike(self, scores: Tensor | Sequence[float]) -> str:
        """Return a caveat where prompts score as if they were of another kind than the controls.

        Args:
            scores: Of all prompts that were asked about.

        Returns:
            "" where the middle one scores like the controls, and of fewer prompts than `FEWEST`.
        """
        scores = torch.as_tensor(scores, dtype=torch.float64)
        if len(scores) < FEWEST or scores.median() <= self.sorted_scores.quantile(1 - HIGH):
            return ""
        return (
            f"More than half of the prompts score above {1 - HIGH:.0%} of the controls. Either "
            "most of them are memorized, or the controls are of another kind, and then the rate of "
            "false alarms does not hold: take controls that are written like the prompts and that "
            "the model has not memorized."
        )

    def _evidence(self, scores: Tensor, collapses: Sequence[float]) -> Tensor:
        measured = torch.as_tensor(collapses, dtype=torch.float64)
        return self.require_second().evidence(scores, measured)

    def require_second(self) -> SecondStage:
        """Return the second stage.

        Raises:
            CalibrationError: There is none.
        """
        if self.second is None:
            raise CalibrationError(
                "This calibration has no second stage: its controls were not sampled. Make one "
                "with `unmemorize calibrate --collapse`, or leave --collapse out."
            )
        return self.second

    def require_observed(self) -> "Calibration":
        """Return what sampled images are judged by.

        Raises:
            CalibrationError: There is none.
        """
        if self.observed is None:
            raise CalibrationError(
                "This calibration judges prompts and no sampled images: it was made with one seed, "
                "several steps, the magnitude alone, or an earlier version. Make one with "
                "`unmemorize calibrate`, two seeds or more and one step."
            )
        return self.observed

    def differences(self, model: str, settings: dict) -> str:
        """Return every field that differs with both values, "" when the calibration fits."""
        pairs: dict[str, tuple[Any, Any]] = {"model": (self.model, model)}
        for key in sorted(self.settings.keys() | settings.keys()):
            pairs[key] = (self.settings.get(key), settings.get(key))
        return "; ".join(
            f"{name}: calibrated {calibrated}, now {now}"
            for name, (calibrated, now) in pairs.items()
            if calibrated != now
        )

    def check(self, model: str, settings: dict, *, force: bool = False) -> str:
        """Make sure that the calibration is for this model and these settings.

        Returns:
            "" when it is; when it is not and `force` is set, a caveat to print with every verdict.

        Raises:
            CalibrationMismatch: It is not; names every differing field with both values.
        """
        differing = self.differences(model, settings)
        if not differing:
            return ""
        if force:
            return (
                "The calibration was made under other conditions; its threshold, p-values and "
                f"rates need not hold here ({differing})."
            )
        raise CalibrationMismatch(
            f"This calibration does not fit: {differing}. Make one for this model and these "
            "settings with `unmemorize calibrate`, or use it all the same with --force."
        )

    def to_values(self) -> dict[str, Any]:
        """Return the calibration as JSON values; of a basis its steps and its file's sha256."""
        return self._values(hashlib.sha256(bases_as_bytes(self._bases())).hexdigest())

    def _values(self, sha256: str) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in BESIDE:
            values[name] = values[name] and values[name]._values(sha256)
        values["second"] = self.second and asdict(self.second)
        values["basis"] = self.basis and {"steps": list(self.basis.steps), "sha256": sha256}
        return values

    def _bases(self) -> dict[str, Tensor]:
        """Return the tensors of all bases, by their names in one file."""
        tensors: dict[str, Tensor] = {}
        for part, prefix in ((self.judge, ""), (self.observed, OBSERVED)):
            if part is not None and part.basis is not None:
                tensors |= part.basis.tensors(prefix)
        return tensors

    def save(self, path: Path) -> None:
        """Write JSON, and the bases beside it if there are any; floats come back bit for bit.

        Raises:
            StorageError: Nothing can be written.
        """
        write_calibration(Path(path), self.to_values(), self._bases())

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            OSError: There is no such file.
            CalibrationError: It is no calibration, of another version, damaged or edited, its
                threshold does not follow from its controls, or the bases beside it are missing or
                others.
        """
        stored, bases = read_calibration(Path(path))
        try:
            return cls._of(stored, Path(path), bases)
        except CalibrationError:
            raise
        except (LookupError, ValueError) as error:
            raise CalibrationError(f"{path} contradicts itself: {error}. {AGAIN}") from error

    @classmethod
    def _of(
        cls, stored: Stored, path: Path, bases: Mapping[str, Tensor], prefix: str = ""
    ) -> "Calibration":
        values = {each.name: getattr(stored, each.name) for each in fields(stored)}
        values["control_scores"] = tuple(map(tuple, stored.control_scores))
        for name in BESIDE:
            part, own = getattr(stored, name), OBSERVED if name == "observed" else ""
            values[name] = part and cls._of(part, path, bases, own)
        if stored.basis is not None:
            values["basis"] = ControlBasis.from_tensors(bases, stored.basis.steps, prefix)
        calibration = cls(**values)
        scores = calibration.seed_scores.nanmean(1)
        expected = threshold_of(scores, calibration.false_positive_rate)
        if not math.isclose(calibration.threshold, expected, rel_tol=1e-9):
            raise CalibrationError(
                f"{path} has threshold {calibration.threshold}, but its controls give {expected}. "
                f"Was it edited? {AGAIN}"
            )
        return calibration


def _supported(
    seed_scores: Float[Tensor, " control seed"], false_positive_rate: float
) -> dict[str, Any]:
    """Return the fields of a calibration that follow from its controls' scores."""
    means = seed_scores.mean(1)
    threshold = threshold_of(means, false_positive_rate)
    return {
        "control_scores": tuple(map(tuple, seed_scores.tolist())),
        "threshold": threshold,
        "interval": clopper_pearson(int((means > threshold).sum()), len(means)),
    }


def _of_residual(
    differences: Float[Tensor, " seed control element"], settings: dict, rate: float
) -> dict[str, Any]:
    """Return the fields of a calibration that follow from what its controls add."""
    require_direction(differences.shape[1])
    count = directions_for(differences.shape[1])
    basis, scores = fit_controls(differences, count, settings["told"])
    return {
        "settings": settings,
        "basis": basis,
        "family_cosine": cosine_limit(differences[0], count),
        **_supported(scores, rate),
    }


def prompts_sha256(prompts: Sequence[str]) -> str:
    """Return the sha256 of the prompts as a JSON list, in order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
