"""Calibration: what scores of ordinary prompts look like on this very model, and verdicts from it.

It holds for prompts exchangeable with the controls. Thresholds do not transfer between models,
dtypes, resolutions or settings, so a calibration is bound to them.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from ..arrays import Float, Tensor
from ..files.storage import replace_atomically
from .config import DetectionConfig
from .denoiser import Denoiser
from .detection import Detection

SCHEMA_VERSION = 1
CONFIDENCE = 0.95


class CalibrationError(ValueError):
    """A calibration file that cannot be read or contradicts itself."""


class CalibrationMismatch(ValueError):
    """A calibration made on another model or with other settings."""


class NotEnoughControls(ValueError):
    """Too few controls for the requested false-positive rate."""


def clopper_pearson(hits: int, n: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a rate of which `hits` of `n` were seen, both in 0..1."""
    from scipy.stats import binomtest

    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"`hits` must be between 0 and `n`, `n` at least 1; got {hits} of {n}.")
    interval = binomtest(hits, n).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def settings_of(denoiser: Denoiser, config: DetectionConfig) -> dict:
    """Return everything besides the weights that moves a score, as plain JSON values."""
    levels = denoiser.sigmas(config.schedule_steps)[: config.steps].tolist()
    return {
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


def controls_needed(false_positive_rate: float) -> int:
    """Return the smallest number of controls that can support a rate: n + 1 >= 1 / rate."""
    return math.ceil(1 / _exact(false_positive_rate)) - 1


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
    """[control seed], mean over steps, L2 norm in latent units."""
    false_positive_rate: float
    """Highest share of ordinary prompts that may be flagged, in expectation, 0..1."""
    threshold: float
    """Scores above it are flagged."""
    interval: tuple[float, float]
    """Clopper-Pearson, 95 %, of the realised false-positive rate."""
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
        threshold = _threshold(seed_scores.nanmean(1), false_positive_rate)
        n, hits = len(seed_scores), int((seed_scores.nanmean(1) > threshold).sum())
        return cls(
            model=model,
            settings=settings,
            controls=name,
            controls_sha256=prompts_sha256(detection.prompts),
            control_scores=tuple(map(tuple, seed_scores.tolist())),
            false_positive_rate=false_positive_rate,
            threshold=threshold,
            interval=clopper_pearson(hits, n),
        )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of the latents that the controls were scored at."""
        return tuple(self.settings["latent_shape"])

    @property
    def seed_scores(self) -> Float[Tensor, " control seed"]:
        """Return the controls' scores per seed (L2 norm, mean over steps), float64."""
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
        return _threshold(scores[:, :seeds].mean(1), self.false_positive_rate)

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
        )

    def p_values(self, scores: Tensor | Sequence[float]) -> Float[Tensor, " prompt"]:
        """Return per score (1 + number of controls at least as high) / (controls + 1), in 0..1."""
        scores, controls = torch.as_tensor(scores, dtype=torch.float64), self.sorted_scores
        at_least = len(controls) - torch.searchsorted(controls, scores.contiguous())
        return (1 + at_least).double() / (len(controls) + 1)

    def adjusted(self, scores: Tensor | Sequence[float]) -> Float[Tensor, " prompt"]:
        """Return p-values corrected over the whole set, Benjamini & Hochberg 1995, in 0..1.

        Flagging all at most q keeps the expected share of false alarms among the flagged below q.
        """
        from scipy.stats import false_discovery_control

        p_values = self.p_values(scores)
        if len(p_values) == 0:
            return p_values
        return torch.from_numpy(false_discovery_control(p_values.numpy(), method="bh"))

    def flags(self, scores: Tensor | Sequence[float]) -> Tensor:
        """Return which scores lie above the threshold, bool [prompt]."""
        return torch.as_tensor(scores, dtype=torch.float64) > self.threshold

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

    def save(self, path: Path) -> None:
        """Write JSON; floats come back bit for bit."""
        with replace_atomically(Path(path)) as part:
            part.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            CalibrationError: Not such a file, of another version, or its threshold does not follow
                from its controls.
        """
        again = "Make a new one with `unmemorize calibrate`."
        try:
            values = json.loads(Path(path).read_text("utf-8"))
        except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
            raise CalibrationError(f"{path} is not a calibration: {error}. {again}") from error
        names = {field.name for field in fields(cls)}
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise CalibrationError(
                f"{path} has schema_version {version}, expected {SCHEMA_VERSION}. {again}"
            )
        if wrong := sorted(names ^ values.keys()):
            raise CalibrationError(f"{path} has missing or unknown fields {wrong}. {again}")
        values["control_scores"] = tuple(map(tuple, values["control_scores"]))
        values["interval"] = tuple(values["interval"])
        calibration = cls(**values)
        expected = _threshold(calibration.seed_scores.nanmean(1), calibration.false_positive_rate)
        if not math.isclose(calibration.threshold, expected, rel_tol=1e-9):
            raise CalibrationError(
                f"{path} has threshold {calibration.threshold}, but its controls give {expected}. "
                f"Was it edited? {again}"
            )
        return calibration


def prompts_sha256(prompts: Sequence[str]) -> str:
    """Return the sha256 of the prompts as a JSON list, in order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _exact(rate: float) -> Fraction:
    if not 0 < rate < 1:
        raise ValueError(f"`false_positive_rate` must lie between 0 and 1, got {rate}.")
    return Fraction(repr(float(rate)))  # .01 as written: 100 * .01 must be 1


def _threshold(scores: Float[Tensor, " control"], false_positive_rate: float) -> float:
    n = len(scores)
    if n < controls_needed(false_positive_rate):
        raise NotEnoughControls(
            f"not enough controls for this claim: a false-positive rate of {false_positive_rate} "
            f"needs at least {controls_needed(false_positive_rate)} controls, found {n}. "
            "Add controls, or allow a higher rate with --false-positive-rate."
        )
    return upper_bound(scores, false_positive_rate)


def upper_bound(scores: Float[Tensor, " control"], rate: float) -> float:
    """Return the score that a further control exceeds with probability at most `rate`.

    The order statistic of rank ceil((n + 1) * (1 - rate)); needs `controls_needed` scores.
    """
    rank = math.ceil((len(scores) + 1) * (1 - _exact(rate)))
    return scores.sort().values[rank - 1].item()
