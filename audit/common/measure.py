"""Work with a journal: what was finished before is never computed again."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from ...shared.arrays import Float, Tensor
from ...shared.files.storage import Journal
from ...shared.files.tensors import TensorFolder
from ...shared.score.calibration import Calibration
from ...shared.score.clips import DIMENSIONS, ClipNorms
from ...shared.score.collapse import SEEDS, collapses
from ...shared.score.config import DetectionConfig
from ...shared.score.control_basis import ControlBasis
from ...shared.score.denoiser import Conditioning, Denoiser
from ...shared.score.detection import Detection, control_differences, detect
from ...shared.score.sequential import detect_sequentially
from .job import content_key
from .result import finite
from .subject import Facts, Subject


@runtime_checkable
class Bar(Protocol):
    """Shows the progress of the work; tqdm's bars fit."""

    def update(self, n: int) -> object:
        """Count `n` more."""

    def close(self) -> None:
        """End the bar."""


Bars = Callable[[str, int, int, str], Bar]
"""Makes a bar from description, total, how many are done already, and unit."""
Item = TypeVar("Item")


class SilentBar:
    """A bar that shows nothing."""

    def update(self, n: int) -> None:
        """Ignore the count."""

    def close(self) -> None:
        """Do nothing."""


def silent(description: str, total: int, initial: int, unit: str) -> Bar:
    """Return a bar that shows nothing."""
    return SilentBar()


def complete(
    journal: Journal,
    keys: Mapping[Item, str],
    compute: Callable[[Item], Any],
    *,
    bars: Bars,
    phase: str,
    unit: str,
    size: Callable[[Item], int] = lambda item: 1,
    whole: Callable[[Any], bool] = lambda value: True,
) -> dict[Item, Any]:
    """Return the stored result of every item; what is missing is computed and stored at once.

    Args:
        journal: Of this phase.
        keys: Under what each item's result is stored.
        compute: From a missing item to its result as JSON values.
        bars: Makes the progress bar.
        phase: Label of the bar.
        unit: What the bar counts.
        size: How many units an item is.
        whole: Whether a stored result can be used; not when a file that it names is gone.
    """
    missing = [
        item for item, key in keys.items() if key not in journal or not whole(journal.get(key))
    ]
    total, left = (sum(map(size, items)) for items in (keys, missing))
    with closing(bars(phase, total, total - left, unit)) as bar:
        for item in missing:
            journal.put(keys[item], compute(item))
            bar.update(size(item))
    return {item: journal.get(key) for item, key in keys.items()}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A detection and what the text encoder did not read."""

    detection: Detection
    cuts: tuple[str, ...]
    """Per prompt, the end that was cut off, or nothing."""
    magnitudes: tuple[float, ...] = ()
    """Per prompt, |D| of the first step at the first seed (Wen et al.), beside residual scores;
    empty where they are not measured yet, and where the scores themselves are magnitudes."""
    clips: ClipNorms | None = None
    """Of a model of videos, the parts of |D| [prompt seed step]; None where they are not measured
    yet, and for images."""
    collapses: tuple[float | None, ...] | None = None
    """Per prompt, its collapse, or None where it was not sampled; None without a second stage."""

    @property
    def sampled(self) -> list[float] | None:
        """Return the collapses as a calibration takes them, NaN where a prompt was not sampled."""
        if self.collapses is None:
            return None
        return [math.nan if value is None else value for value in self.collapses]


def measure(
    subject: Subject,
    facts: Facts,
    prompts: Sequence[str],
    config: DetectionConfig,
    journal: Journal,
    *,
    job_key: str,
    bars: Bars,
    phase: str,
    basis: ControlBasis | None = None,
    sequentially: Calibration | None = None,
    differences: TensorFolder | None = None,
) -> Measured:
    """Score prompts; each batch is stored as soon as it is finished.

    Args:
        subject: The model; not loaded when the journal knows every prompt.
        facts: Of the same job.
        prompts: Distinct.
        config: What to measure.
        journal: Of this phase.
        job_key: Stands for model and settings in the keys.
        bars: Makes the progress bar, which counts prompts, or sequentially their seeds.
        phase: Label of the bar.
        basis: Scores are residuals outside of it.
        sequentially: Draw only the seeds that a verdict by this calibration needs.
        differences: Takes D of the first step as well, from the same forward passes; of these
            prompts alone, and not with a basis or sequentially.
    """
    keys = [content_key(job_key, prompt) for prompt in prompts]
    config = replace(config, batch_size=facts.rows)
    kept = range(len(prompts)) if differences is None else differences.numbers()
    known = {i: _trace(journal.get(keys[i])) for i in kept if keys[i] in journal}
    # Sequentially all prompts of a chunk are finished at the same time, so their seeds are counted.
    total, initial, unit = len(prompts), len(known), "prompt"
    if sequentially is not None:
        total, unit = total * len(config.seeds), "seed"
        initial = total if len(known) == len(prompts) else 0
    with closing(bars(phase, total, initial, unit)) as bar:
        if len(known) < len(prompts):
            watched, pending = _CutWatch(subject.denoiser), dict[str, Any]()

            def store(drawn: int = 0) -> None:
                done = dict(pending)
                if done:
                    journal.put_all(done)
                    pending.clear()
                if counted := len(done) if sequentially is None else drawn:
                    bar.update(counted)

            def on_result(index: int, trace: Tensor) -> None:
                cut = watched.cuts.get(prompts[index], "")
                value = {"trace": finite(trace.tolist()), "cut": cut}
                pending[keys[index]] = pending.get(keys[index], {}) | value

            def on_clip(index: int, parts: Tensor) -> None:
                pending[keys[index]] = {"clip": finite(parts.tolist())}

            keep = None if differences is None else differences.put
            score = partial(detect, basis=basis, on_difference=keep, on_clip=on_clip)
            if sequentially is not None:
                score = partial(detect_sequentially, calibration=sequentially)
            score(watched, prompts, config, known=known, on_result=on_result, progress=store)
            store()
    parts = [journal.get(key).get("clip") for key in keys]
    clips = None
    if len(facts.info.latent_shape) == DIMENSIONS and all(parts):
        clips = ClipNorms.unpacked(torch.tensor(parts, dtype=torch.float64))
    return Measured(
        detection=Detection(
            prompts=tuple(prompts),
            traces=torch.stack([_trace(journal.get(key)) for key in keys]),
            latent_elements=math.prod(facts.info.latent_shape),
            config=config,
            seed_levels=sequentially.seed_scores.median(0).values if sequentially else None,
            clips=clips,
        ),
        clips=clips,
        cuts=tuple(journal.get(key)["cut"] for key in keys),
    )


def measure_judged(
    subject: Subject,
    facts: Facts,
    prompts: Sequence[str],
    config: DetectionConfig,
    journal: Journal,
    *,
    judge: Calibration | None,
    sequential: bool,
    collapse: bool,
    job_key: str,
    bars: Bars,
) -> Measured:
    """Score prompts as a calibration scored its controls; arguments as of `measure`.

    Args:
        subject: The model.
        facts: Of the same job.
        prompts: Distinct.
        config: What to measure.
        journal: Of this phase.
        judge: What the scores will be compared with; None measures magnitudes. Residuals are
            measured at its own seeds, where its directions are known.
        sequential: Draw only the seeds that a verdict needs; needs a calibration.
        collapse: Sample suspicious prompts as well; needs a calibration with a second stage.
        job_key: Stands for model and settings in the keys.
        bars: Makes the progress bars.
    """
    basis = judge.basis if judge else None
    if judge and basis:  # of other seeds only where the calibration is forced
        config = replace(config, seeds=tuple(judge.settings["seeds"]))
    measured = measure(
        subject, facts, prompts, config, journal, job_key=job_key, bars=bars, phase="detection",
        basis=basis, sequentially=judge if sequential else None,
    )  # fmt: skip
    if judge and collapse:
        found = measure_collapses(
            subject, facts, prompts, judge.suspicious(measured.detection.scores), journal,
            job_key=job_key, bars=bars, phase="collapse",
        )  # fmt: skip
        collapses = tuple(found.get(index) for index in range(len(prompts)))
        measured = replace(measured, collapses=collapses)
    return measured


def with_magnitudes(
    measured: Measured,
    subject: Subject,
    facts: Facts,
    journal: Journal,
    *,
    job_key: str,
    bars: Bars,
) -> Measured:
    """Return scores with |D| of each prompt at the first seed beside them.

    Of a model of videos |D| is measured at all seeds, since its parts are judged by their means.

    Args:
        measured: From `measure_judged`, by a residual score or sequentially.
        subject: The model.
        facts: Of the same job.
        journal: Of the phase that scored the prompts.
        job_key: Stands for model and settings in the keys.
        bars: Makes the progress bar.
    """
    detection = measured.detection
    config = detection.config
    if len(facts.info.latent_shape) < DIMENSIONS:
        config = replace(config, seeds=config.seeds[:1])
    first = measure(
        subject, facts, detection.prompts, config, journal,
        job_key=content_key(job_key, "magnitude"), bars=bars, phase="magnitude",
    )  # fmt: skip
    magnitudes = first.detection.traces[:, 0].mean(1)
    return replace(measured, magnitudes=tuple(magnitudes.tolist()), clips=first.clips)


def measure_collapses(
    subject: Subject,
    facts: Facts,
    prompts: Sequence[str],
    suspicious: Sequence[int],
    journal: Journal,
    *,
    job_key: str,
    bars: Bars,
    phase: str,
) -> dict[int, float]:
    """Return the collapse of suspicious prompts by index; each batch is stored when it is finished.

    Args:
        subject: The model; not loaded when the journal knows them all.
        facts: Of the same job.
        prompts: All of them, distinct.
        suspicious: Which of them are sampled.
        journal: Of this phase.
        job_key: Stands for model and settings in the keys.
        bars: Makes the progress bar, which counts prompts.
        phase: Label of the bar.
    """
    together = max(1, facts.rows // len(SEEDS))
    texts = {
        tuple(batch): [prompts[index] for index in batch]
        for start in range(0, len(suspicious), together)
        if (batch := suspicious[start : start + together])
    }
    found = complete(
        journal, {batch: content_key(job_key, "collapse", texts[batch]) for batch in texts},
        lambda batch: _collapses(subject.denoiser, texts[batch]),
        bars=bars, phase=phase, unit="prompt", size=len,
    )  # fmt: skip
    return {
        index: value
        for batch, values in found.items()
        for index, value in zip(batch, values, strict=True)
    }


def _collapses(denoiser: Denoiser, texts: Sequence[str]) -> list[float]:
    """Return the collapses of prompts; out of GPU memory, of one half after the other."""
    try:
        return collapses(denoiser, texts)
    except torch.cuda.OutOfMemoryError:
        if len(texts) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(texts) // 2
    return _collapses(denoiser, texts[:half]) + _collapses(denoiser, texts[half:])


def measure_differences(
    subject: Subject,
    facts: Facts,
    prompts: Sequence[str],
    config: DetectionConfig,
    told: Sequence[int],
    finished: TensorFolder,
    *,
    bars: Bars,
    phase: str,
) -> Float[Tensor, " seed prompt element"]:
    """Return what prompts add at told levels; each is stored as soon as it is finished.

    Args:
        subject: The model.
        facts: Of the same job.
        prompts: Distinct.
        config: Gives the seeds.
        told: Steps of the schedule whose level the network is told, one a seed.
        finished: Of these prompts alone; the caller removes it when all is done.
        bars: Makes the progress bar, which counts prompts.
        phase: Label of the bar.
    """
    config = replace(config, batch_size=facts.rows)
    known = finished.known()

    def store(index: int, difference: Tensor) -> None:
        finished.put(index, difference)
        bar.update(1)

    with closing(bars(phase, len(prompts), len(known), "prompt")) as bar:
        return control_differences(
            subject.denoiser, prompts, config, told, known=known, on_result=store
        )


def _trace(value: dict[str, Any]) -> Tensor:
    """Return [seed step] float64; None in the journal is a seed that was not drawn."""
    rows = [[math.nan if item is None else item for item in row] for row in value["trace"]]
    return torch.tensor(rows, dtype=torch.float64)


class _CutWatch:
    """A denoiser that remembers what its text encoder cut off each prompt."""

    def __init__(self, denoiser: Denoiser):
        self.parametrization = denoiser.parametrization
        self.latent_shape = denoiser.latent_shape
        self.guidance_distilled = denoiser.guidance_distilled
        self.device, self.dtype = denoiser.device, denoiser.dtype
        self.unconditional, self.sigmas = denoiser.unconditional, denoiser.sigmas
        self.initial_noise, self.denoise = denoiser.initial_noise, denoiser.denoise
        self._encode = denoiser.encode
        self.cuts: dict[str, str] = {}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode and take note."""
        cond = self._encode(prompts)
        self.cuts.update(zip(prompts, cond.cut, strict=False))
        return cond
