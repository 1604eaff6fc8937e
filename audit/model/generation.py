"""Sample images for audited prompts, each prompt's stored as soon as it is finished."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice

from ...shared.files.storage import replace_atomically
from ..common.job import Job, content_key
from ..common.measure import Bar
from ..common.subject import Subject
from .config import AuditConfig


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A prompt that gets images."""

    index: int
    """Of the prompt."""
    prompt: str
    seeds: tuple[int, ...]

    def path(self, seed: int) -> str:
        """Return where the image of `seed` stands, relative to the output folder."""
        return f"images/{self.index:05d}-seed{seed}.png"


def plan_images(
    config: AuditConfig, prompts: Sequence[str], scores: Sequence[float], flags: Sequence[bool]
) -> list[Sampled]:
    """Choose the prompts that get images: the highest flagged, and some of the rest, evenly spread.

    The choice depends on scores and settings alone, so that a continued job makes the same.
    """
    if config.images_per_prompt == 0:
        return []
    order = sorted(range(len(prompts)), key=lambda i: (-scores[i], i))
    flagged = [i for i in order if flags[i]][: config.flagged_pictured]
    rest = [i for i in order if not flags[i]]
    wanted = min(config.sample, len(rest))
    # From the middle of equal parts of the ranking, so that neither end is favoured.
    others = [rest[(2 * k + 1) * len(rest) // (2 * wanted)] for k in range(wanted)]
    seeds = image_seeds(config)
    chosen = [(i, seeds) for i in flagged] + [(i, seeds[:1]) for i in others]
    return [Sampled(index=i, prompt=prompts[i], seeds=s) for i, s in chosen]


def image_seeds(config: AuditConfig) -> tuple[int, ...]:
    """Return the seeds of a prompt's images: those it was measured with first."""
    first = config.detection.seeds
    more = (seed for seed in count() if seed not in first)
    return tuple(
        islice((*first, *islice(more, config.images_per_prompt)), config.images_per_prompt)
    )


def unfinished(plan: Sequence[Sampled], job: Job, job_key: str) -> list[Sampled]:
    """Return what of the plan is still to be sampled: not in the journal, or its files are gone."""
    journal = job.journal("images")
    return [
        sampled
        for sampled in plan
        if _key(sampled, job_key) not in journal
        or not all((job.folder / sampled.path(seed)).is_file() for seed in sampled.seeds)
    ]


def generate_images(
    subject: Subject, config: AuditConfig, plan: Sequence[Sampled], job: Job, job_key: str, bar: Bar
) -> None:
    """Sample everything in `plan` and write the images into the job's folder."""
    for sampled in plan:
        images = subject.denoiser.generate(
            [sampled.prompt] * len(sampled.seeds),
            list(sampled.seeds),
            steps=config.generation_steps,
            cond_scale=config.detection.cond_scale,
        )
        for seed, image in zip(sampled.seeds, images, strict=True):
            with replace_atomically(job.folder / sampled.path(seed)) as part:
                image.save(part, format="PNG")
        job.journal("images").put(
            _key(sampled, job_key), {"files": [sampled.path(seed) for seed in sampled.seeds]}
        )
        bar.update(len(images))


def _key(sampled: Sampled, job_key: str) -> str:
    return content_key(job_key, sampled.prompt, sampled.seeds)
