"""Run a repair: audit, try every method, take what keeps most, and audit that as well.

    repair = run_repair(RepairConfig(audit=LoraAuditConfig(lora=..., images=...), output=...))

Trials are judged by the audit's rule on noises of their own. The audit of the result draws the
noises of the first audit, which no trial has seen: a method that was chosen for its luck with some
noises has to pass there, else what keeps less is taken.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

from ....shared.files.images import read_image
from ....shared.files.prompts import PromptError
from ....shared.files.storage import make_folder, replace_atomically
from ....shared.files.weights import ModelError, file_sha256
from ....shared.score.controls import load_controls
from ....shared.wording import counted
from ...common.measure import Bars, silent
from ...common.result import versions
from ..ask import Plan, Shot, ask, paraphrases, questions
from ..compare import mark_shots
from ..draw import batches, draw_batch, draw_round_trips
from ..header import OURS, REPAIR
from ..result import LoraAudit
from ..rule import COPY
from ..run import audit_of, opened, run_lora_audit
from ..work import Notify, Work
from .case import Case
from .config import METHODS, RepairConfig
from .page import tell
from .predictions import Batch, Sample, kept, make_batches
from .result import Pictured, Repair, Trial, back, rate_of
from .search import search
from .weights import Factors, LoraWeights

if TYPE_CHECKING:
    from torch import Tensor

OFFSET = 1000
"""First seed of trials; those of the audits begin at 0."""
HELD = 32
"""Prompts that are to be kept at most; half of them are measured only."""
MEMORIZED, MEASURED = 64, 24
"""Batches that methods see of memorized captions and of those to be kept; of those measured."""
ASKED = 8
"""Images whose captions a trial is asked, the most similar ones; the audits ask all."""
PICTURED = 6
FINALS = 3
"""Audits of a result at most."""
TRIALS = "images/trials"


class OutputTaken(ValueError):
    """The file that is to be written is there already."""


class NothingToRepair(ValueError):
    """No training image comes back from the LoRA."""


LEAST_KEPT = 0.05
"""Below it what is left is the base model, which is no repair."""


class NotRepaired(RuntimeError):
    """Whatever was tried, images still come back; no file was written."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What trials are judged with."""

    plan: Plan
    work: Work
    case: Case
    before: LoraAudit
    asked: tuple[Shot, ...]
    """Of a trial: captions of the images that come back, other wordings, the trigger."""
    others: tuple[str, ...]
    """Prompts that no method sees, on which what is kept is measured."""
    measured: tuple[Batch, ...]
    trips: tuple[Path, ...]

    def judge(self, method: str, left: float, factors: Factors) -> Trial:
        """Return what a trial gives back and what it keeps."""
        self.case.weights.put(factors)
        folder = f"{TRIALS}/{digest(factors)}"
        shots = [replace(shot, path=f"{folder}/{shot.path}") for shot in self.asked]
        draw_here(shots, self.work, f"{method}, {left:.0%} left")
        marks = self.marks(shots)
        targets = back(self.before)
        return Trial(
            method=method, left=left, kept=kept(self.case.denoiser, self.measured),
            back=rate_of((marks[:, targets] == COPY).any(0).tolist()),
            images=rate_of((marks == COPY).any(1).tolist()),
        )  # fmt: skip

    def marks(self, shots: Sequence[Shot]) -> "Tensor":
        """Return [shot image] marks of images drawn with the LoRA, those of the base left out."""
        off = [shot for shot in self.plan.shots if shot.mode == "off"]
        return marks_of(self.plan, [*shots, *off], self.trips, self.work, self.before)[: len(shots)]


def run_repair(
    config: RepairConfig, bars: Bars = silent, notify: Notify = lambda sentence: None
) -> Repair:
    """Repair a LoRA, and write the file, both audits and a page of both.

    Args:
        config: What to repair and where to write.
        bars: Makes the progress bars.
        notify: Takes sentences about what is known so far.

    Raises:
        NothingToRepair: No training image comes back; nothing but the audit was written.
        NotRepaired: Nothing that was tried stands the audit; no LoRA was written.
        ModelError: The LoRA is none of this model's, or no plain one, or the model makes videos.
        OutputTaken: `output` is there already.
    """
    if config.output.exists() and not config.audit.overwrite:
        raise OutputTaken(
            f"{config.output} exists. Choose another --output, or add --overwrite to replace it."
        )
    make_folder(config.report)
    with opened(config.before, bars, notify) as (material, work):
        if work.subject.video:
            raise ModelError(
                f"A repair draws images, and {work.subject.name} makes videos: audit its LoRA with "
                "`unmemorize audit`, and train again where clips come back."
            )
        weights = LoraWeights(work.subject.denoiser.pipeline, config.audit.lora)
        plan = ask(material, work)
        before = audit_of(plan, work)
        targets = back(before)
        if not targets:
            raise NothingToRepair(
                f"Nothing to repair: {before.headline.text} The audit lies in "
                f"{config.before.output}."
            )
        notify(f"{len(targets)} of {len(before.verdicts)} training images come back.")
        bench = prepare(plan, work, before, weights)
        trials = []
        for name in config.methods:
            path = METHODS[name](bench.case)
            for trial, factors in search(
                path, lambda left, f, name=name: bench.judge(name, left, f)
            ):
                trials.append((trial, factors))
                notify(said(trial))
        chosen, after = audit_best(trials, config, bench, bars)
        with replace_atomically(config.output) as part:
            copyfile(candidate(config), part)
        candidate(config).unlink()
        factors = next(factors for trial, factors in trials if trial is chosen)
        repair = show(
            Repair(before=before, after=after, trials=tuple(trial for trial, _ in trials),
                   chosen=chosen, held=len({p for b in bench.case.held for p in b.prompts}),
                   measured=len(bench.others), likeness=0.0, likeness_base=0.0, pictured=(),
                   output=config.output, sha256=file_sha256(config.output),
                   folder=config.report),
            bench, factors,
        )  # fmt: skip
    tell(repair, include_images=config.audit.include_images)
    return repair


def candidate(config: RepairConfig) -> Path:
    """Return the file that is audited before it becomes the output, in a folder of its own."""
    return config.report / "candidate" / config.output.name


def said(trial: Trial) -> str:
    """Return what a trial gave, in a sentence."""
    return (
        f"{trial.method}, {trial.left:.0%} left: {trial.back.count} of {trial.back.total} images "
        f"come back, {trial.kept:.0%} kept."
    )


def digest(factors: Factors) -> str:
    """Return what tells factors from others, 16 hexadecimal digits."""
    total = sha256()
    for place in sorted(factors):
        total.update(factors[place].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def draw_here(shots: Sequence[Shot], work: Work, bar: str) -> None:
    """Draw what is missing of some shots with the LoRA as it lies on the pipeline now."""
    config, folder = work.config, work.job.folder
    with closing(work.bars(bar, len(shots), 0, "image")) as progress:
        for batch in batches(shots, config.batch_size):
            if not all((folder / shot.path).is_file() for shot in batch):
                draw_batch(batch, work.subject, config, folder)
            progress.update(len(batch))


def marks_of(
    plan: Plan, shots: Sequence[Shot], trips: Sequence[Path], work: Work, before: LoraAudit
) -> "Tensor":
    """Return [shot trained-image] marks; what the base model draws by itself is no mark."""
    files = [work.job.folder / shot.path for shot in shots]
    _, _, marked = mark_shots(plan, shots, files, trips, work)
    marks = marked.marks[:, : len(before.verdicts)].clone()
    marks[:, [v.image for v in before.verdicts if v.verdict == "base"]] = 0
    return marks


def prepare(plan: Plan, work: Work, before: LoraAudit, weights: LoraWeights) -> Bench:
    """Return what methods are given and what trials are judged with.

    Raises:
        PromptError: Every prompt that could be kept gives a training image back.
    """
    training, config, denoiser = plan.training, work.config, work.subject.denoiser
    targets, trips = set(back(before)), draw_round_trips(training, work)
    strongest = [v.image for v in before.ranked if v.image in targets][:ASKED]
    captions = {training.images[i].caption for i in targets}
    wording = [(caption, text) for caption in sorted(captions)
               for text in (caption, *paraphrases(caption))]  # fmt: skip
    asked = tuple(
        Shot(prompt=q.prompt, asked=q.asked, source=q.source, seed=seed + OFFSET, mode="on",
             stage="captions", path=f"{place:03d}-{seed}.png")
        for place, q in enumerate(questions(training, config)) for seed in q.seeds
        if q.source in strongest or q.asked == "trigger"
    )  # fmt: skip

    # Prompts to be kept, with what the LoRA draws for them; none that brings an image back.
    shots = [
        Shot(prompt=text, asked="example", source=None, seed=OFFSET, mode="on",
             stage="other words", path=f"{TRIALS}/kept/{place:03d}-on.png")
        for place, text in enumerate(kept_prompts(plan, work, captions))
    ]  # fmt: skip
    draw_here(shots, work, "prompts to be kept")
    off = [shot for shot in plan.shots if shot.mode == "off"]
    marks = marks_of(plan, [*shots, *off], trips, work, before)[: len(shots)]
    good = [shot for shot, row in zip(shots, marks, strict=True) if not (row == COPY).any()]
    if len(good) < 4:
        raise PromptError(
            f"Only {counted(len(good), 'prompt', 'prompts')} of {len(shots)} give no training "
            "image back, and a repair needs 4 to tell what is to be kept. Give the prompts that "
            "the LoRA is meant for: --prompts FILE."
        )

    def samples(shots: Sequence[Shot]) -> list[Sample]:
        images = [read_image(work.job.folder / shot.path) for shot in shots]
        return [Sample(prompt=shot.prompt, latents=latents) for shot, latents in
                zip(shots, denoiser.encode_images(images), strict=True)]  # fmt: skip

    of = {shot.prompt: shot for shot in reversed(off)}
    memorized = []
    for i in sorted(targets):
        image = training.images[i]
        rows = denoiser.encode_images([read_image(training.path_of(image))])
        drawn = samples([of[image.caption]]) if image.caption in of else []
        for text in [text for caption, text in wording if caption == image.caption]:
            memorized += [Sample(prompt=text, latents=rows[0]),
                          *(replace(each, prompt=text) for each in drawn)]  # fmt: skip
    empty = [shot for shot in plan.shots if shot.mode == "on" and not shot.prompt]
    held = samples([*good[::2], *empty[:2]])
    parts = ((memorized, MEMORIZED), (held, MEMORIZED), (samples(good[1::2]), MEASURED))
    with closing(work.bars("predictions", sum(n for _, n in parts), 0, "batch")) as bar:
        batched = [
            make_batches(denoiser, part, count, levels=config.generation_steps, seed=seed,
                         progress=bar.update)
            for seed, (part, count) in enumerate(parts)
        ]  # fmt: skip
    case = Case(denoiser=denoiser, weights=weights, bars=work.bars, memorized=batched[0],
                held=batched[1])  # fmt: skip
    return Bench(
        plan=plan, work=work, case=case, before=before, asked=asked, trips=trips,
        others=tuple(shot.prompt for shot in good[1::2]), measured=batched[2],
    )  # fmt: skip


def kept_prompts(plan: Plan, work: Work, memorized: set[str]) -> list[str]:
    """Return prompts that the LoRA is meant for, besides the captions that bring images back.

    Other captions of the folder and of held-out images, prompts that were given, and, where these
    are few, ordinary prompts behind the trigger.
    """
    training = plan.training
    known = [image.caption for image in training.images if image.caption]
    examples = [q.prompt for q in plan.questions if q.asked == "example"]
    start = f"{training.trigger}, " if training.trigger else ""
    controls = [f"{start}{text}" for text in load_controls("photographs")[:: 250 // HELD]]
    texts = dict.fromkeys(text for text in (*known, *examples) if text not in memorized)
    few = [] if len(texts) >= HELD // 2 else controls[: HELD // 2 - len(texts)]
    return [*list(texts)[:HELD], *few]


def audit_best(
    trials: Sequence[tuple[Trial, Factors]], config: RepairConfig, bench: Bench, bars: Bars
) -> tuple[Trial, LoraAudit]:
    """Return the trial that keeps most of those whose own audit finds nothing, and that audit.

    Raises:
        NotRepaired: There is none.
    """
    clean = [pair for pair in trials if not pair[0].back.count and pair[0].kept >= LEAST_KEPT]
    ranked = sorted(clean, key=lambda pair: -pair[0].kept)
    for trial, factors in ranked[:FINALS]:
        candidate(config).parent.mkdir(exist_ok=True)
        bench.case.weights.save(factors, candidate(config), history_of(trial, config, bench))
        after = run_lora_audit(config.after(candidate(config)), bars)
        if not back(after):
            return trial, after
        bench.work.notify(
            f"{said(trial)} Its own audit still finds {len(back(after))}: {after.headline.text}"
        )
    most = "; ".join(said(trial) for trial, _ in trials[-2:])
    raise NotRepaired(
        f"{counted(len(trials), 'trial', 'trials')} of {', '.join(config.methods)}, and none "
        f"stands an audit of its own, so no LoRA was written. The last: {most} Train again with "
        f"the flags that the audit in {config.before.output} names."
    )


def history_of(trial: Trial, config: RepairConfig, bench: Bench) -> dict[str, str]:
    """Return what the repaired file's header says of the repair."""
    before = bench.before
    return {
        f"{OURS}{REPAIR}": f"{trial.method}, {trial.left:.4g} left",
        f"{OURS}{REPAIR}.source": before.lora.name,
        f"{OURS}{REPAIR}.source_sha256": before.lora.sha256,
        f"{OURS}{REPAIR}.came_back": f"{len(back(before))} of {len(before.verdicts)}",
        f"{OURS}{REPAIR}.kept": f"{trial.kept:.3f}",
        f"{OURS}{REPAIR}.base_sha256": before.model_fingerprint,
        f"{OURS}{REPAIR}.version": versions()["unmemorize"],
    }


def show(repair: Repair, bench: Bench, factors: Factors) -> Repair:
    """Draw prompts to be kept with the repaired LoRA and without any, and compare the images."""
    work, folder = bench.work, f"{TRIALS}/kept"
    shots: dict[str, list[Shot]] = {
        name: [Shot(prompt=text, asked="example", source=None, seed=OFFSET,
                    mode="off" if name == "base" else "on", stage="other words",
                    path=f"{folder}/{place:03d}-{name}-{digest(factors)}.png")
               for place, text in enumerate(bench.others)]
        for name in ("base", "lora", "repaired")
    }  # fmt: skip
    rows = {}
    for name, drawn in shots.items():
        bench.case.weights.put(factors if name == "repaired" else bench.case.weights.original)
        draw_here(drawn, work, f"side by side, {name}")
        rows[name] = work.drawn.rows([work.job.folder / shot.path for shot in drawn])
    likeness, of_base = (float((rows[name] * rows["lora"]).sum(1).mean())
                         for name in ("repaired", "base"))  # fmt: skip
    start = work.job.folder.name
    pictured = tuple(
        Pictured(prompt=text, **{name: f"{start}/{shots[name][i].path}" for name in shots})
        for i, text in enumerate(bench.others[:PICTURED])
    )
    return replace(repair, likeness=likeness, likeness_base=of_base, pictured=pictured)
