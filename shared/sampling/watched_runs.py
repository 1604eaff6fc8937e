"""Scores of a host's own sampling runs, verdicts on their images, and the verdicts in words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..arrays import Float, Tensor
from ..mitigation.gate import GuardedImage
from ..score.calibration import Calibration
from ..score.clips import DIMENSIONS, ClipNorms, clip_norms
from ..score.config import CLIP_PARTS
from ..score.metrics import per_element, text_noise, text_noise_norm
from ..wording import counted
from .first_level import HIGHEST, LOWEST, misfit

KEPT_RUNS = 16
NO_CALIBRATION = "A verdict needs a calibration of this model."
NO_RESIDUAL = (
    "the calibration has none for sampled images. Run Calibrate again, with two seeds or more and "
    "one step"
)
PROMPTS_ALONE = "The calibration judges prompts and no sampled images."
BEFORE_SAMPLING = (
    "Memorization Check judges the prompt before it is sampled, whatever the sampler does."
)
NO_PARTS = (
    "No verdict on content and motion: each needs controls of its own, of such clips on this model."
)
SAME_LEVEL = 1e-4
"""Relative distance of noise levels that are one level, computed in two ways."""


@dataclass(kw_only=True)
class WatchedRun:
    """One run of a sampler."""

    from_noise: bool = True
    """It began at pure noise, not at an image or where another sampler had stopped."""
    begins: float = 0.0
    """Noise level at which sampling began; 0 where nobody knows."""
    unlike: str = ""
    """What the prompt has besides its text, so that no control compares; empty of a text alone."""
    latent_shape: tuple[int, ...] = ()
    """Of one image, without the batch."""
    latent_id: str = ""
    """Of the latent it returned; empty while it runs."""
    extra_passes: int = 0
    """Predictions that were computed for the measurement alone."""
    guarded: tuple[GuardedImage, ...] = ()
    """What a guard decided about each image; empty when there was none."""
    reason: str = "the sampler stopped before its first step"
    """Why there are no scores; of no meaning when there are."""
    negative: str = ""
    """What the prompt was compared with, as calibrations name it; empty where nobody knows."""
    against: tuple[Tensor, ...] = field(default=(), repr=False)
    """Its embeddings [1 token width]; none where nobody knows."""
    _first: Tensor | None = field(default=None, repr=False)
    _rows: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)
    """Level, and per image sigma * |D| of the latent, then of the parts of a clip, if it is one."""

    def add(self, x0_cond: Tensor, x0_uncond: Tensor, sigma: Float[Tensor, " image"]) -> None:
        """Measure one pair of predictions; a level of 0 measures nothing.

        Args:
            x0_cond: [image *latent] clean latents predicted from the prompt.
            x0_uncond: The same from the negative or empty prompt.
            sigma: Noise level of each image, all the same.
        """
        self.latent_shape = tuple(x0_cond.shape[1:])
        if not self._rows:
            self._first = text_noise(x0_uncond, x0_cond, sigma.flatten()[0])
        norms = text_noise_norm(x0_cond, x0_uncond)[:, None]
        if len(self.latent_shape) == DIMENSIONS and self.latent_shape[1] > 1:
            parts = clip_norms(text_noise(x0_uncond, x0_cond, 1.0)).packed()
            norms = torch.cat([norms, parts], dim=1)
        # Read later: a device must not be waited for inside somebody's sampling loop.
        self._rows.append((sigma.flatten()[0], norms))

    def end(self) -> None:
        """Bring what was measured to the CPU: sampling is over and may wait for the device."""
        self._first = None if self._first is None else self._first.cpu()
        self._rows = [(sigma.cpu(), norms.cpu()) for sigma, norms in self._rows]

    def residuals(self, observed: Calibration) -> Float[Tensor, " image"]:
        """Return the residual per image at the first evaluation, L2 norm, float64 on the CPU.

        Args:
            observed: What sampled images are judged by, where `misfits` is empty.
        """
        assert observed.basis is not None
        assert self._first is not None
        return observed.basis.residual(self._first.cpu(), [0] * len(self._first)).double()

    def misfits(self, judging: Calibration, model: str | None) -> tuple[str, ...]:
        """Return why scores of the images do not compare with the controls', one sentence each.

        Args:
            judging: What sampled images are judged by.
            model: Sha256 of the weights that were sampled with; None where nobody knows.
        """
        sigmas, settings = self.sigmas, judging.settings
        told = []
        if model not in (None, judging.model):
            told.append("the weights are others than the controls were measured with")
        if self.unlike:
            told.append(f"the controls are texts alone, and here {self.unlike}")
        if not self.from_noise:
            told.append("sampling did not begin at pure noise")
        elif self.begins and sigmas[0] < LOWEST * self.begins:
            told.append(
                f"the first step, at noise level {self.begins:.4g}, was not measured (cfg was 1 or "
                f"a prompt was off): the first that was is at {sigmas[0]:.4g}"
            )
        if self.negative != settings.get("negative", ""):
            told.append("the negative prompt is another one than the controls were compared with")
        if first := misfit(judging, self.latent_shape, sigmas[0]):
            told.append(first)
        if len(sigmas) < settings["steps"]:
            told.append(f"the controls have {settings['steps']} steps, this run has {len(sigmas)}")
        elif any(
            not LOWEST * level <= sigma <= HIGHEST * level
            for sigma, level in zip(sigmas[1:], settings["sigmas"][1:], strict=False)
        ):
            told.append("the steps after the first are at other noise levels than the controls'")
        return tuple(f"{reason[0].upper()}{reason[1:]}." for reason in told)

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
        return torch.stack([norms[:, 0] for _, norms in levels], dim=1)

    @property
    def clips(self) -> ClipNorms | None:
        """Return the parts of `traces` of clips [image level]; None of images and of one frame."""
        levels = self._levels()
        if not levels or levels[0][1].shape[1] == 1:
            return None
        return ClipNorms.unpacked(torch.stack([norms[:, 1:] for _, norms in levels], dim=1))

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
    calibration: Callable[[WatchedRun], Calibration | None] | None = None
    """Returns the calibration that a host has made by itself for such a run, if it has."""
    runs: list[WatchedRun] = field(default_factory=list)

    def start(self, run: WatchedRun) -> None:
        """Add a run and let go of old ones."""
        self.runs.append(run)
        del self.runs[:-KEPT_RUNS]

    def find(self, latent_id: str) -> WatchedRun | None:
        """Return the latest run that made a latent; None of the latents of other samplers."""
        return next((run for run in reversed(self.runs) if run.latent_id == latent_id), None)


@dataclass(frozen=True, kw_only=True)
class PartVerdict:
    """Content or motion of a clip."""

    name: str
    """One of `CLIP_PARTS`."""
    score: float
    """L2 norm of this part of D, latent units, mean over the judged steps."""
    p_value: float | None = None
    """Among the same part of the controls, 0..1; None where they have none."""
    memorized: bool | None = None
    """Whether it is above the threshold of this part; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class ImageVerdict:
    """One image of a batch."""

    score: float
    """What decides, L2 norm in latent units: the residual, or the magnitude."""
    magnitude: float
    """|D|, L2 norm in latent units, mean over the judged steps."""
    per_element: float
    """The score as root mean square, which does not move with resolution."""
    p_value: float | None = None
    """Of the score among the controls', 0..1; None without a calibration."""
    memorized: bool | None = None
    """Whether the score is above the threshold; None without a calibration."""
    parts: tuple[PartVerdict, ...] = ()
    """Content and motion of a clip; none of images."""

    @property
    def hit(self) -> bool:
        """Return whether the score, or a part of it, is above its threshold."""
        return bool(self.memorized) or any(part.memorized for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class RunVerdict:
    """A run as the calibration sees it."""

    images: tuple[ImageVerdict, ...]
    measure: str = "magnitude"
    """What the scores are: "residual", outside of what the controls add, or "magnitude"."""
    reason: str = ""
    """Why images that have a verdict are not judged by residuals."""
    steps: int
    """Noise levels the scores are means over, counted from the noisiest."""
    threshold: float | None = None
    controls: tuple[float, float] | None = None
    """Between these lie the scores of 90 % of the controls."""
    caveats: tuple[str, ...] = ()
    """Why there is no verdict although there is a calibration, one sentence each."""

    @property
    def hits(self) -> int:
        """Return how many images are above a threshold."""
        return sum(image.hit for image in self.images)


def judge(
    run: WatchedRun,
    calibration: Calibration | None = None,
    *,
    steps: int = 1,
    model: str | None = None,
) -> RunVerdict:
    """Return the scores of a run's images, and verdicts where there is a calibration.

    An image is one seed: it is compared with what the controls score at one seed, by the residual
    where the calibration has one. A verdict compares like with like: where the run is not what the
    controls were, there are magnitudes and the reasons, and no verdict.

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
    scores = magnitudes = traces[:, :steps].mean(1)
    judging: Calibration | None = None
    caveats: tuple[str, ...] = ()
    if calibration is not None:
        judging = calibration.observed or calibration
        caveats = run.misfits(judging, model)
        if calibration.basis is not None and calibration.observed is None:
            caveats = (*caveats, PROMPTS_ALONE)
    by_residual = judging is not calibration and not caveats
    if judging is not None and by_residual:
        scores = run.residuals(judging)
    images = [
        ImageVerdict(score=score, magnitude=magnitude, per_element=element)
        for score, magnitude, element in zip(
            scores.tolist(), magnitudes.tolist(),
            per_element(scores, run.latent_shape).tolist(), strict=True,
        )
    ]  # fmt: skip
    parts = _parts(run, None if caveats else calibration, steps)
    images = [replace(image, parts=own) for image, own in zip(images, parts, strict=True)]
    if judging is None or caveats:
        return RunVerdict(images=tuple(images), steps=steps, caveats=caveats)
    single = _of_one_seed(judging)
    p_values, flags = single.p_values(scores).tolist(), single.flags(scores).tolist()
    quantiles = single.sorted_scores.quantile(torch.tensor([0.05, 0.95]).double())
    return RunVerdict(
        images=tuple(
            replace(image, p_value=p_value, memorized=memorized)
            for image, p_value, memorized in zip(images, p_values, flags, strict=True)
        ),
        measure="residual" if by_residual else "magnitude",
        reason="" if by_residual else NO_RESIDUAL,
        steps=steps,
        threshold=single.threshold,
        controls=tuple(quantiles.tolist()),
    )


def _of_one_seed(calibration: Calibration) -> Calibration:
    return replace(
        calibration,
        control_scores=tuple(scores[:1] for scores in calibration.control_scores),
        threshold=calibration.threshold_for(1),
    )


def _parts(
    run: WatchedRun, calibration: Calibration | None, steps: int
) -> list[tuple[PartVerdict, ...]]:
    """Return content and motion per image, judged where the calibration knows both."""
    if run.clips is None:
        return [()] * len(run.traces)
    columns = []
    for name in CLIP_PARTS:
        scores = getattr(run.clips, name)[:, :steps].mean(1)
        p_values: list = [None] * len(scores)
        flags: list = [None] * len(scores)
        if calibration is not None and (controls := getattr(calibration, name)) is not None:
            single = _of_one_seed(controls)
            p_values, flags = single.p_values(scores).tolist(), single.flags(scores).tolist()
        columns.append([
            PartVerdict(name=name, score=score, p_value=p_value, memorized=flag)
            for score, p_value, flag in zip(scores.tolist(), p_values, flags, strict=True)
        ])  # fmt: skip
    return [*zip(*columns, strict=True)]


def headline(verdict: RunVerdict) -> str:
    """Return the result of a run in a few words."""
    images = len(verdict.images)
    if verdict.threshold is None:
        return "No verdict: scores only" if verdict.caveats else "Scores only: no calibration"
    if images == 1:
        return "Looks memorized" if verdict.hits else "Does not look memorized"
    if not verdict.hits:
        return f"None of {images} images looks memorized"
    return f"{verdict.hits} of {images} images {'looks' if verdict.hits == 1 else 'look'} memorized"


def image_line(verdict: RunVerdict, index: int) -> str:
    """Return the result of one image of the batch in one line."""
    image = verdict.images[index]
    parts = [f"image {index + 1}", f"score {image.score:.3g}"]
    if verdict.measure == "residual":
        parts.append(f"magnitude {image.magnitude:.3g}")
    if image.p_value is not None:
        parts += [f"p = {image.p_value:.2g}", "looks memorized" if image.memorized else "ordinary"]
    for part in image.parts:
        looks = {True: ", looks memorized", False: ", ordinary", None: ""}[part.memorized]
        parts.append(f"{part.name} {part.score:.3g}{looks}")
    return "  ·  ".join(parts)


def verdict_text(verdict: RunVerdict, calibration: Calibration | None, extra_passes: int) -> str:
    """Return the result of a run in full, one fact a line."""
    steps = "the first step" if verdict.steps == 1 else f"the first {verdict.steps} steps"
    lines = [headline(verdict), *(image_line(verdict, i) for i in range(len(verdict.images)))]
    magnitude = f"L2 norm of what the text adds to the prediction, mean over {steps}."
    if verdict.measure == "residual":
        lines.append("Score: residual, the L2 norm outside of what control prompts add.")
        lines.append(f"Magnitude: {magnitude}")
    else:
        lines.append(f"Score: magnitude, {magnitude}")
    if verdict.images[0].parts:
        lines.append(
            "Content: norm of what the text adds to all frames alike; motion: of the rest."
        )
        if verdict.images[0].parts[0].memorized is None:
            lines.append(NO_PARTS)
    if calibration is None:
        lines.append(NO_CALIBRATION)
    elif verdict.caveats:
        lines += ["No verdict, because the run is not what the controls were:", *verdict.caveats]
        lines.append(BEFORE_SAMPLING)
    else:
        if verdict.reason:
            lines.append(f"Not judged by the residual: {verdict.reason}.")
        lines.append(
            f"Threshold {verdict.threshold:.4g}: at most {calibration.false_positive_rate:.2g} of "
            f"ordinary prompts score higher, by {len(calibration.control_scores)} controls "
            f"({calibration.controls}). p: share of controls that score at least as high."
        )
    if extra_passes:
        passes = counted(extra_passes, "additional pass", "additional passes")
        lines.append(f"Measured anyway: {passes} of the network.")
    return "\n".join(lines)


def guard_lines(images: Sequence[GuardedImage]) -> list[str]:
    """Return what a guard decided about each image of a run, one line each."""
    lines = []
    for number, image in enumerate(images, 1):
        acted = f"acted by {image.method}" if image.fired else "did not act"
        parts = [f"image {number}", f"guard {acted}"]
        if image.score_before is not None:
            parts.append(f"prompt scores {image.score_before:.3g}, threshold {image.threshold:.3g}")
        if image.noise_before is not None:
            parts.append(f"initial noise {image.noise_before:.3g} to {image.noise_after:.3g}")
        lines.append("  ·  ".join(parts))
    return lines


def metadata(verdict: RunVerdict) -> dict:
    """Return the result as plain JSON values, for the metadata of the saved images."""
    images = verdict.images
    return {
        "measure": verdict.measure,
        "score": [image.score for image in images],
        "magnitude": [image.magnitude for image in images],
        "score_per_element": [image.per_element for image in images],
        "steps": verdict.steps,
        "threshold": verdict.threshold,
        "p_value": [image.p_value for image in images],
        "memorized": [image.memorized for image in images],
        "clips": [
            {
                part.name: {
                    "score": part.score,
                    "p_value": part.p_value,
                    "memorized": part.memorized,
                }
                for part in image.parts
            }
            for image in images
            if image.parts
        ],
        "caveats": list(verdict.caveats),
    }
