"""Run an audit of a LoRA: read, ask, draw, compare, judge, tell; killed anywhere, it continues.

    audit = run_lora_audit(LoraAuditConfig(lora=Path("my.safetensors"), images=Path("my_images")))

Captions are asked first. After each stage, and when the work is interrupted, a page is written that
says what is still open. Whatever takes time is stored as soon as it is finished: scores in
``<output>/journal``, images as files that are whole or absent. Everything else follows from these,
so that an audit that was stopped and continued ends with the same bytes as one that was not.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

from ...shared.dependencies import check_installed
from ...shared.wording import counted
from ..common.job import open_job
from ..common.measure import Bars, silent
from ..common.sscd import Sscd
from ..common.subject import Subject
from . import compare as comparing
from .ask import STAGES, Plan, ask, part_of
from .config import LoraAuditConfig, identity_of
from .draw import batches, draw, estimate, has_round_trips, unfinished
from .feature_cache import FeatureCache
from .judge import judge
from .read import Material, read
from .result import Asked, LoraAudit
from .tell import tell, write_page
from .work import Notify, Work

QUICK = 2
"""Stages of a quick audit: the captions."""
KINDS: dict[Asked, str] = {
    "caption": "captions", "example": "example prompts", "paraphrase": "rewordings",
    "trigger": "the trigger word", "empty": "no words", "attack": "the extraction attack",
}  # fmt: skip
NEEDS = {"reports": ("jinja2", "networkx", "PIL", "scipy"), "models": ("peft", "accelerate"),
         "sscd": ("faiss",)}  # fmt: skip


def run_lora_audit(
    config: LoraAuditConfig, bars: Bars = silent, notify: Notify = lambda sentence: None
) -> LoraAudit:
    """Audit a LoRA and write page, files and images into `config.output`.

    Args:
        config: What to audit and where to write.
        bars: Makes the progress bars.
        notify: Takes sentences, before hours of work, about what looks wrong and how long it takes.

    Raises:
        ImportError: An optional package is missing; says what to type.
        ModelError: The model or a LoRA cannot be used.
        PromptError: The training folder cannot be read.
        ValueError: The epochs cannot be read.
        FolderTaken: The output folder holds something else.
        StorageError: Nothing can be written; what was finished is kept.
        DrawingError: One of several processes has failed; what was finished is kept.
    """
    with opened(config, bars, notify) as (material, work):
        return audit_of(ask(material, work), work)


@contextmanager
def opened(config: LoraAuditConfig, bars: Bars, notify: Notify) -> Iterator[tuple[Material, Work]]:
    """Claim the output folder of an audit for a block; arguments and errors of `run_lora_audit`."""
    for extra, modules in NEEDS.items():  # before hours of work, not after
        check_installed(modules, purpose="An audit of a LoRA", extra=extra)
    encoder, subject = Sscd(), Subject.of(config)
    features = FeatureCache(encoder)
    material = read(config, subject.location)
    epochs = [epoch.sha256 for epoch in material.epochs]
    identity = identity_of(
        config, material.training, epochs, subject, features.name, material.prompts
    )
    with open_job(
        config.output, identity, overwrite=config.overwrite, check=lambda: subject.denoiser
    ) as job:
        yield material, Work(
            config=config, subject=subject, job=job, encoder=encoder,
            facts=subject.facts(job.journal("model"), config.detection), features=features,
            drawn=FeatureCache(encoder, job.folder / "journal" / "features"),
            bars=bars, notify=notify,
        )  # fmt: skip


def audit_of(plan: Plan, work: Work) -> LoraAudit:
    """Return the audit of a plan, written into its folder."""
    try:
        audit = _answer(plan, work)
    except KeyboardInterrupt:
        if known := _known(plan, work):
            _tell_so_far(known, work)
        raise
    tell(audit, include_images=work.config.include_images)
    return audit


def _answer(plan: Plan, work: Work) -> LoraAudit:
    """Ask one stage after the other, and write a page between them."""
    config, stages = work.config, STAGES[:QUICK] if work.config.quick else STAGES
    parts = [part_of(plan, [s for s in plan.shots if s.stage in stages[: place + 1]])
             for place in range(len(stages))]  # fmt: skip
    if not config.quick:
        parts[-1] = plan
    parts = [
        part
        for place, part in enumerate(parts)
        if part.shots and (place == len(parts) - 1 or part.shots != parts[place + 1].shots)
    ]
    # Before the images: were the work stopped, the page would wait for it.
    comparing.positive_control(work)
    planned = batches(parts[-1].shots, config.batch_size)
    work.notify(estimate(planned, work.subject, work.job.folder, config))
    for part, following in pairwise(parts):
        drawn = draw(part, work)
        if unfinished([following.shots], work.job.folder):
            audit = judge(part, drawn, comparing.compare(part, drawn, work), work)
            _tell_so_far(replace(audit, open=_open(plan, part)), work)
    drawn = draw(parts[-1], work)
    audit = judge(parts[-1], drawn, comparing.compare(parts[-1], drawn, work), work)
    return replace(audit, open=_open(plan, parts[-1]))


def _known(plan: Plan, work: Work) -> LoraAudit | None:
    """Return what the images say that were drawn before the work was stopped.

    None before a question was drawn with the LoRA and without it.
    """
    there = [shot for shot in plan.shots if (work.job.folder / shot.path).is_file()]
    sides = [{(s.prompt, s.seed) for s in there if s.mode == mode} for mode in ("on", "off")]
    both = sides[0] & sides[1]
    part = part_of(plan, [s for s in there if s.mode == "attack" or (s.prompt, s.seed) in both])
    if not both or not has_round_trips(plan.training, work):
        return None
    part = replace(part, questions=tuple(q for q in part.questions if work.knows(q.prompt)))
    drawn = draw(part, work)
    audit = judge(part, drawn, comparing.compare(part, drawn, work), work, words=False)
    return replace(audit, open=_open(plan, part))


def _open(plan: Plan, part: Plan) -> tuple[str, ...]:
    """Return a sentence on what was not asked, nothing when all was."""
    there = {shot.path for shot in part.shots}
    left = Counter(KINDS[shot.asked] for shot in plan.shots if shot.path not in there)
    kinds = [f"{counted(count, 'image', 'images')} by {kind}" for kind, count in left.items()]
    if epochs := len(plan.epochs) - len(part.epochs):
        kinds.append(counted(epochs, "saved epoch", "saved epochs"))
    return (f"Not asked for: {', '.join(kinds)}.",) if kinds else ()


def _tell_so_far(audit: LoraAudit, work: Work) -> None:
    page = write_page(audit, include_images=work.config.include_images)
    work.notify(" ".join(["Known so far:", audit.headline.text, *audit.open, f"Page: {page}"]))
