"""A model with known truth, what it predicted, computed once and kept, and scores made of it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from bench_models import BenchModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from unmemorize.audit.common.subject import Subject
from unmemorize.shared.files.storage import replace_atomically
from unmemorize.shared.models.calibrate import calibrate
from unmemorize.shared.score.calibration import Calibration
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.control_basis import fit_controls, told_steps
from unmemorize.shared.score.denoiser import Denoiser
from unmemorize.shared.score.detection import Progress, control_differences

from .groups import Groups, groups_of
from .ranking import Draw

WORK = Path("build/bench-detection")
"""Where what models predict and draw is kept, for all benchmarks."""
ROWS = 64
"""Captions whose residual is taken at once: each row repeats the directions."""


@dataclass(frozen=True)
class Case:
    """One model in one dtype, with the truth about its captions.

    What is computed with it is kept in files, each whole or not there: a run that was stopped goes
    on with the first that is missing. A model with other weights has another folder.
    """

    model: BenchModel
    subject: Subject
    """The same, loaded when something is missing."""
    groups: Groups
    work: Path
    """Of all models."""
    config: DetectionConfig = field(default_factory=DetectionConfig)

    @classmethod
    def of(cls, model: BenchModel, work: Path) -> "Case":
        """Return a model in float32 with the shipped settings."""
        return cls(model, Subject(model.model, dtype="float32"), groups_of(model), work)

    @cached_property
    def calibration(self) -> Calibration:
        """Return the product's own calibration from the controls."""
        return calibrate(self.subject.denoiser, self.groups.of(self.groups.controls), self.config)

    @property
    def folder(self) -> Path:
        """Return where its files lie."""
        name = f"{self.model.name}-{self.subject.fingerprint[:12]}-{self.subject.dtype}"
        return self.work / name

    @property
    def told(self) -> tuple[int, ...]:
        """Return the shipped steps of the schedule to tell the network, one a seed."""
        return told_steps(len(self.config.seeds), self.config.schedule_steps)

    def step(self, share: float) -> int:
        """Return the step before which so much of the schedule lies."""
        return round(share * self.config.schedule_steps)

    def differences(self, step: int, texts: Sequence[str] | None = None) -> Tensor:
        """Return D [seed caption element], float32: pure noise, told the level of `step`.

        Args:
            step: Of the schedule.
            texts: Other prompts than the model's own captions.
        """
        prompts = self.groups.texts if texts is None else texts

        def compute(denoiser: Denoiser, progress: Progress) -> Tensor:
            told = [step] * len(self.config.seeds)
            return control_differences(denoiser, prompts, self.config, told, progress=progress)

        return self.kept(f"told-{step:02d}", prompts, compute)

    def shipped(self, texts: Sequence[str] | None = None) -> Tensor:
        """Return D [seed caption element] at the shipped levels; `texts` as of `differences`."""
        if texts is None:  # other seeds at these levels are wanted as well
            rows = [self.differences(step)[seed] for seed, step in enumerate(self.told)]
            return torch.stack(rows)

        def compute(denoiser: Denoiser, progress: Progress) -> Tensor:
            return control_differences(denoiser, texts, self.config, self.told, progress=progress)

        return self.kept("told-in-turns", texts, compute)

    def kept(
        self, name: str, texts: Sequence[str], compute: Callable[[Denoiser, Progress], Tensor]
    ) -> Tensor:
        """Return what is kept under a name for these prompts, computed if it is not there.

        Args:
            name: Of the measurement with all its settings but those of `config`.
            texts: The prompts.
            compute: Is given the model and a function that takes numbers of finished prompts.
        """
        key = hashlib.sha256(repr((list(texts), self.config)).encode()).hexdigest()
        path = self.folder / f"{name}-{key[:12]}.safetensors"
        if not path.is_file():
            label = f"{self.model.name} in {self.subject.dtype}: {name}"
            with tqdm(total=len(texts), desc=label) as bar:
                tensor = compute(self.subject.denoiser, bar.update)
            with replace_atomically(path) as part:
                save_file({"tensor": tensor.contiguous()}, part)
        return load_file(path)["tensor"]


def magnitudes(differences: Tensor, controls: Sequence[int]) -> list[Draw]:
    """Return |D| per seed, of all captions and of the controls.

    Args:
        differences: [seed caption element].
        controls: Indices of captions.
    """
    norms = torch.linalg.vector_norm(differences, dim=2, dtype=torch.float64)
    return [Draw(seed, seed[list(controls)]) for seed in norms]


def residuals(differences: Tensor, controls: Tensor, count: int) -> list[Draw]:
    """Return the score outside the controls per seed, as detection and calibration have it.

    Args:
        differences: Of captions, [seed caption element].
        controls: D of the controls, [seed control element].
        count: Directions.
    """
    basis, fitted = fit_controls(controls, count, [0] * len(controls))
    draws = []
    for seed, (rows, own) in enumerate(zip(differences, fitted.T, strict=True)):
        norms = [basis.residual(part, [seed] * len(part)) for part in rows.split(ROWS)]
        draws.append(Draw(basis.scores(torch.cat(norms), [seed] * len(rows)), own))
    return draws


def over_seeds(by_seed: Sequence[Draw], count: int) -> list[Draw]:
    """Return means over `count` seeds: the draws are the groups that the seeds can be cut into."""
    draws = []
    for first in range(0, len(by_seed) - count + 1, count):
        part = by_seed[first : first + count]
        controls = None
        if part[0].controls is not None:
            controls = torch.stack([d.controls.double() for d in part]).mean(0)
        draws.append(Draw(torch.stack([d.scores.double() for d in part]).mean(0), controls))
    return draws
