"""What a host's own sampling runs say about memorization, and verdicts on their images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..arrays import Float, Tensor
from ..score.calibration import Calibration
from ..score.metrics import per_element, text_noise_norm
from .guard_record import GuardedImage

KEPT_RUNS = 16
SAME_LEVEL = 1e-4
"""Relative distance of noise levels that are one level, computed in two ways."""


@dataclass(kw_only=True)
class WatchedRun:
    """One run of a sampler."""

    from_noise: bool = True
    """It began at pure noise, not at an image or where another sampler had stopped."""
    latent_shape: tuple[int, ...] = ()
    """Of one image, without the batch."""
    latent_id: str = ""
    """Of the latent it returned; empty until it has."""
    extra_passes: int = 0
    """Predictions that were computed for the measurement alone."""
    guarded: tuple[GuardedImage, ...] = ()
    """What a guard decided about each image; empty when there was none."""
    reason: str = "the sampler stopped before its first step"
    """Why there are no scores; of no meaning when there are."""
    _rows: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def add(self, x0_cond: Tensor, x0_uncond: Tensor, sigma: Float[Tensor, " image"]) -> None:
        """Measure one pair of predictions; levels of 0 say nothing.

        Args:
            x0_cond: [image *latent] clean latents predicted from the prompt.
            x0_uncond: The same from the negative or empty prompt.
            sigma: Noise level of each image, all the same.
        """
        self.latent_shape = tuple(x0_cond.shape[1:])
        # Read later: a device must not be waited for inside somebody's sampling loop.
        self._rows.append((sigma.flatten()[0], text_noise_norm(x0_cond, x0_uncond)))

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Return the measured noise levels, noisiest first."""
        return tuple(sigma for sigma, _ in self._levels())

    @property
    def traces(self) -> Float[Tensor, " image level"]:
        """Return |D| per image and noise level, L2 norm in latent units, float64 on the CPU."""
        levels = self._levels()
        if not levels:
            return torch.zeros(0, 0, dtype=torch.float64)
        return torch.stack([norms for _, norms in levels], dim=1)

    def _levels(self) -> list[tuple[float, Tensor]]:
        """Return the last evaluation at each level: samplers of second order correct themselves."""
        levels: list[tuple[float, Tensor]] = []
        rows = [(float(sigma), norms.cpu().double()) for sigma, norms in self._rows]
        for sigma, norms in sorted(rows, key=lambda row: -row[0]):  # stable: in order of time
            if sigma <= 0:
                continue
            if levels and levels[-1][0] - sigma <= SAME_LEVEL * sigma:
                levels.pop()
            levels.append((sigma, norms / sigma))
        return levels


@dataclass
class WatchRecord:
    """The latest runs of every sampler downstream of one watched model."""

    model: Callable[[], str] | None = None
    """Returns the sha256 of the watched weights; reading them all takes its time."""
    runs: list[WatchedRun] = field(default_factory=list)

    def start(self, run: WatchedRun) -> None:
        """Add a run and let go of old ones."""
        self.runs.append(run)
        del self.runs[:-KEPT_RUNS]

    def find(self, latent_id: str) -> WatchedRun | None:
        """Return the run that made a latent: by the latent itself, or the only one there is."""
        for run in reversed(self.runs):
            if run.latent_id == latent_id:
                return run
        return self.runs[0] if len(self.runs) == 1 else None


@dataclass(frozen=True, kw_only=True)
class ImageVerdict:
    """One image of a batch."""

    score: float
    """|D|, L2 norm in latent units, mean over the judged steps."""
    per_element: float
    """The same as root mean square, which does not move with resolution."""
    p_value: float | None = None
    """Of the score among the controls', 0..1; None without a calibration."""
    memorized: bool | None = None
    """Whether the score is above the threshold; None without a calibration."""


@dataclass(frozen=True, kw_only=True)
class RunVerdict:
    """A run as the calibration sees it."""

    images: tuple[ImageVerdict, ...]
    steps: int
    """Noise levels the scores are means over, counted from the noisiest."""
    threshold: float | None = None
    controls: tuple[float, float] | None = None
    """Between these lie the scores of 90 % of the controls."""
    caveats: tuple[str, ...] = ()
    """What makes the calibration not fit, one sentence each."""

    @property
    def hits(self) -> int:
        """Return how many images are above the threshold."""
        return sum(bool(image.memorized) for image in self.images)


def judge(
    run: WatchedRun,
    calibration: Calibration | None = None,
    *,
    steps: int = 1,
    model: str | None = None,
) -> RunVerdict:
    """Return the scores of a run's images, and verdicts where there is a calibration.

    An image is one seed: it is compared with what the controls score at one seed.

    Args:
        run: With at least one measured level.
        calibration: Of this model; it decides `steps`.
        steps: Noise levels to average over, at most as many as were measured.
        model: Sha256 of the weights that were sampled with; None where nobody knows.
    """
    if calibration is not None:
        steps = calibration.settings["steps"]
    traces = run.traces
    steps = min(steps, traces.shape[1])
    scores = traces[:, :steps].mean(1)
    each = per_element(scores, run.latent_shape).tolist()
    if calibration is None:
        images = tuple(
            ImageVerdict(score=score, per_element=element)
            for score, element in zip(scores.tolist(), each, strict=True)
        )
        return RunVerdict(images=images, steps=steps)
    single = _for_one_seed(calibration)
    return RunVerdict(
        images=tuple(
            ImageVerdict(score=score, per_element=element, p_value=p_value, memorized=memorized)
            for score, element, p_value, memorized in zip(
                scores.tolist(), each, single.p_values(scores).tolist(),
                single.flags(scores).tolist(), strict=True,
            )
        ),
        steps=steps,
        threshold=single.threshold,
        controls=tuple(
            single.sorted_scores.quantile(torch.tensor([0.05, 0.95]).double()).tolist()
        ),
        caveats=_caveats(run, calibration, model),
    )  # fmt: skip


def _for_one_seed(calibration: Calibration) -> Calibration:
    return replace(
        calibration,
        control_scores=tuple(scores[:1] for scores in calibration.control_scores),
        threshold=calibration.threshold_for(1),
    )


def _caveats(run: WatchedRun, calibration: Calibration, model: str | None) -> tuple[str, ...]:
    """Return how the run differs from what the calibration was made with."""
    found = []
    if model is not None and model != calibration.model:
        found.append("Calibrated on other weights; thresholds do not carry over.")
    shape = tuple(calibration.settings["latent_shape"])
    if shape != run.latent_shape:
        found.append(f"Calibrated on latents of {_sizes(shape)}, this one is "
                     f"{_sizes(run.latent_shape)}.")  # fmt: skip
    if not run.from_noise:
        found.append("Sampling did not begin at pure noise, where the controls were measured.")
    if len(run.sigmas) < calibration.settings["steps"]:
        found.append(
            f"Calibrated on {calibration.settings['steps']} steps, this run has {len(run.sigmas)}."
        )
    return tuple(found)


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
