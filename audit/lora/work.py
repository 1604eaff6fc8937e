"""What the phases of an audit compute with: one job's folder, model, encoder and journals."""

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ...shared.arrays import Float, Tensor
from ..common.job import Job, content_key
from ..common.measure import Bars, measure
from ..common.sscd import Sscd
from ..common.subject import Facts, Subject
from .config import LoraAuditConfig
from .feature_cache import FeatureCache

Notify = Callable[[str], object]
"""Takes a sentence for the user."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """The means of one job; whatever takes time is stored with it as soon as it is finished."""

    config: LoraAuditConfig
    subject: Subject
    """The base model under the LoRA."""
    facts: Facts
    job: Job
    encoder: Sscd
    features: FeatureCache
    """Of the user's images."""
    drawn: FeatureCache
    """Of images that nobody needs after the job."""
    bars: Bars
    notify: Notify

    def embed(
        self, cache: FeatureCache, paths: Sequence[Path], bar: str
    ) -> Float[Tensor, " image dimension"]:
        """Return the embeddings of image files, unit vectors, under a progress bar."""
        with closing(self.bars(bar, len(paths), 0, "image")) as progress:
            return cache.rows(paths, progress=progress.update)

    def knows(self, prompt: str) -> bool:
        """Return whether a prompt was scored with the LoRA and without."""
        journal = self.job.journal("scores")
        keys = [content_key(self.job.key, print_) for print_ in (self.subject.fingerprint, None)]
        return all(content_key(key, prompt) in journal for key in keys)

    def scores(self, prompts: Sequence[str], subject: Subject, *, lora: bool) -> dict[str, float]:
        """Return the mean |D| of each prompt with the subject's LoRA, or of the base model."""
        key = content_key(self.job.key, subject.fingerprint if lora else None)
        journal = self.job.journal("scores")
        known = sum(content_key(key, prompt) in journal for prompt in prompts)
        off = not lora and known < len(prompts)  # a finished job never loads the model
        with subject.denoiser.lora_disabled() if off else nullcontext():
            measured = measure(
                subject, self.facts, prompts, self.config.detection, journal, job_key=key,
                bars=self.bars, phase=f"LoRA {'on' if lora else 'off'}",
            )  # fmt: skip
        return dict(zip(prompts, measured.detection.scores.tolist(), strict=True))
