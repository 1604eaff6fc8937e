"""`unmemorize audit`: of a model and prompts, of a LoRA and its folder, or of it and a concept."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..audit.common.wording import near_ones
from ..shared.wording import bare, counted, visible
from .common.options import (
    AnswerOptions,
    AuditConfig,
    CalibrationFile,
    Collapse,
    Controls,
    DetectionOptions,
    Fast,
    Force,
    GenerationSteps,
    InstancePrompt,
    ModelOptions,
    OutputFolder,
    Prompts,
    Rate,
    Score,
    Trigger,
    check_calibration,
    settings_in,
    takes_options,
)
from .common.terminal import (
    FAILED,
    FOUND,
    NOTHING_FOUND,
    SHOWN,
    Table,
    answering,
    bar,
    print_json,
    print_table,
)
from .concept.audit import OfConcept, audit_concept

if TYPE_CHECKING:
    from ..audit.lora.config import LoraAuditConfig
    from ..audit.lora.result import LoraAudit
    from ..audit.model.result import AuditResult

EXIT_CODES = """
Exit codes: 0 nothing found (or nothing to find), 3 at least one prompt is above the threshold
(of a LoRA with --images: at least one training image comes back; with --concept: it draws the
concept), 1 failed, 2 wrong usage,
130 interrupted. Above the threshold does not mean certain: about
rate x prompts are expected there by chance, and the summary says how many.
"""


OF_CONCEPT = ("prompts", "controls")
"""Of the options of other audits, those that the one of a concept takes as well."""
OF_BOTH = ("prompts",)
"""Of options that stand with the one audit, those that the other takes as well."""


@dataclass(frozen=True, kw_only=True)
class OfPrompts:
    """What only the audit of a model and prompts takes."""

    prompts: Prompts = None
    controls: Controls = AuditConfig.controls
    calibration: CalibrationFile = None
    force: Force = AuditConfig.force
    false_positive_rate: Rate = AuditConfig.false_positive_rate
    score: Score = AuditConfig.score
    explain: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=0,
            metavar="N",
            help="Flagged prompts that are explained, highest score first; default: all.",
        ),
    ] = AuditConfig.explain
    flagged_pictured: Annotated[
        int, typer.Option(min=0, help="Flagged prompts that get images, highest score first.")
    ] = AuditConfig.flagged_pictured
    sample: Annotated[int, typer.Option(min=0, help="Other prompts that get one image each.")] = (
        AuditConfig.sample
    )
    fast: Fast = AuditConfig.sequential
    collapse: Collapse = AuditConfig.collapse


@dataclass(frozen=True, kw_only=True)
class OfLora:
    """What only the audit of a LoRA takes; the defaults are those of `LoraAuditConfig`."""

    held_out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Images of the same subject that were not trained on: stricter controls."
        ),
    ] = None
    reserve: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, max=0.9, help="Share of --images that was not trained on."),
    ] = None
    instance_prompt: InstancePrompt = None
    trigger: Trigger = None
    epochs: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            help="Files or folder of saved epochs, of which one is to be published; repeatable."
        ),
    ] = None
    captions: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, metavar="N", help="Captions that are asked, the most repeated first. "
                     "Default: 100."),
    ] = None  # fmt: skip
    quick: Annotated[
        bool, typer.Option("--quick", help="Ask the captions alone; without it the rest is asked.")
    ] = False
    attack: Annotated[
        bool,
        typer.Option(
            help="Also try to extract training images by guidance from base model to LoRA."
        ),
    ] = True
    include_images: Annotated[
        bool, typer.Option("--include-images", help="Show training images in the page unblurred.")
    ] = False
    processes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Processes that generate images; on GPUs, one each."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class AuditOptions(AnswerOptions, OfConcept, OfLora, DetectionOptions, OfPrompts, ModelOptions):
    """Of `unmemorize audit`."""

    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder that --lora was trained on: audits the LoRA, not the prompts."),
    ] = None
    output: OutputFolder = AuditConfig.output
    overwrite: Annotated[
        bool, typer.Option(help="Replace another audit in the folder; the same one continues.")
    ] = AuditConfig.overwrite
    images_per_prompt: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Images of each flagged prompt, 0: no images at all; with "
                     "--images, of each caption. Default: 2, with --images 4."),
    ] = None  # fmt: skip
    generation_steps: GenerationSteps = AuditConfig.generation_steps

    def check(self) -> None:
        """Refuse options of both kinds of audit, and one without what it belongs to.

        Raises:
            typer.BadParameter: Names the option.
        """
        if self.concept:
            self._check_concept()
            return
        for field in fields(OfConcept):
            if getattr(self, field.name) is not None:
                raise typer.BadParameter(f"--{field.name.replace('_', '-')} needs --concept.")
        for field in fields(OfPrompts if self.images else OfLora):
            if getattr(self, field.name) != field.default and field.name not in OF_BOTH:
                goes = "does not go with" if self.images else "needs"
                name = field.name.replace("_", "-")
                raise typer.BadParameter(f"--{name} {goes} --images.")
        if self.images and not self.lora:
            raise typer.BadParameter("--images needs --lora, the file that was trained on them.")
        if self.frames is not None and not self.images:
            raise typer.BadParameter(
                "--frames: without --images an audit draws images and no videos. Score a video "
                "model's prompts with `unmemorize detect`."
            )
        check_calibration(self)

    def _check_concept(self) -> None:
        if not self.lora:
            raise typer.BadParameter("--concept needs --lora: the LoRA that is asked for it.")
        others = {field.name: field for kind in (OfPrompts, OfLora, DetectionOptions)
                  for field in fields(kind) if field.name not in OF_CONCEPT}  # fmt: skip
        others |= {field.name: field for field in fields(self)
                   if field.name in ("images", "images_per_prompt", "frames")}  # fmt: skip
        if self.prompts and self.controls != AuditConfig.controls:
            raise typer.BadParameter(
                "--controls and --prompts are both the prompts that a concept's audit asks: name "
                "one of them."
            )
        for name, field in others.items():
            if getattr(self, name) != field.default:
                name = name.replace("_", "-")
                raise typer.BadParameter(f"--{name} does not go with --concept.")

    @property
    def of_prompts(self) -> AuditConfig:
        """The settings of an audit of a model and prompts."""
        given = {"prompts": tuple(self.prompts or ()), "sequential": self.fast,
                 "detection": self.detection}  # fmt: skip
        settings = settings_in(self, AuditConfig) | given
        if self.images_per_prompt is None:
            del settings["images_per_prompt"]
        return AuditConfig(**settings)

    @property
    def of_lora(self) -> "LoraAuditConfig":
        """The settings of an audit of a LoRA."""
        from ..audit.lora.config import LoraAuditConfig

        given = settings_in(self, LoraAuditConfig)
        if self.output == AuditConfig.output:  # another kind of audit, another folder
            del given["output"]
        if not self.attack:
            given["attack_images"] = 0
        # Rows of a forward pass are another thing than images that are sampled at once.
        detection = DetectionOptions(seeds=self.seeds, steps=self.steps).detection
        given = {name: value for name, value in given.items() if value is not None}
        return LoraAuditConfig(**given, detection=detection)


@takes_options
def audit(options: AuditOptions) -> None:
    """Audit a model: detect, explain, generate, compare, and write a report folder.

    Without MODEL the bundled demo is audited. With --lora and --images a LoRA and the folder it was
    trained on: are its images given back? Interrupted at any moment, the same command continues
    where it stopped; with other settings it asks for another folder. With --lora and --concept:
    does the LoRA draw a concept that was to be kept out, by name, by description or unasked?
    """
    options.check()
    if options.concept:
        raise typer.Exit(audit_concept(options, options.concept))
    raise typer.Exit(_audit_lora(options) if options.images else _audit_model(options))


def _audit_model(options: AuditOptions) -> int:
    with answering(options, resumes=True):
        from ..audit.common.result import finite
        from ..audit.model.run import run_audit

        result = run_audit(options.of_prompts, bar, _say_what_is_known)
    if options.as_json:
        files = ("report.html", "results.jsonl", "summary.json", "calibration.json")
        print_json(finite({
            **result.summary,
            "output": str(result.folder),
            "files": {name: str(result.folder / name) for name in files},
            "flagged": [asdict(entry) for entry in result.flagged],
        }))  # fmt: skip
    else:
        print_table(*_flagged(result))
        typer.echo(audit_verdict(result))
    return FOUND if result.found else NOTHING_FOUND


def _audit_lora(options: AuditOptions) -> int:
    with answering(options, resumes=True):
        from ..audit.lora.run import run_lora_audit

        config = options.of_lora
        done = run_lora_audit(config, bar, lambda sentence: typer.echo(sentence, err=True))
    if options.as_json:
        from ..audit.lora.document import to_document

        print_json(to_document(done) | {"output": str(done.folder)})
    else:
        print_table(*_training_images(done))
        typer.echo(_lora_verdict(done))
    if not done.positive_control.works:
        return FAILED
    back = any(verdict.verdict == "verbatim" for verdict in done.verdicts)
    return FOUND if back else NOTHING_FOUND


def _say_what_is_known(result: "AuditResult") -> None:
    """Say, while work is open, what a page shows that was just written."""
    from ..audit.model.report import headline_of

    lines = [f"{headline_of(result)}.", *result.open, f"Page: {result.folder / 'report.html'}"]
    typer.echo(visible("Known so far: " + " ".join(lines)), err=True)


def _flagged(result: "AuditResult") -> Table:
    """Return the highest flagged prompts, those near a memorized one behind it."""
    rows = []
    for entry in result.families[:SHOWN]:
        known = entry.explanation
        words = [each.word for each in known.occlusions[:2]] if known else []
        rows.append([
            f"{entry.score:.4g}", f"{entry.p_value:.2g}", "near" if entry.near else "memorized",
            entry.group or "-", entry.prompt[:200], ", ".join(bare(word) for word in words),
        ])  # fmt: skip
    title = "Flagged prompts, highest score first, near ones under the memorized one"
    columns = ["score", "p", "verdict", "group", "prompt", "by the words"]
    return title + _left(result.flagged), columns, rows


def audit_verdict(result: "AuditResult") -> str:
    """Return the closing sentences: counts, certainty, caveats, where to look."""
    summary, share = result.summary, result.summary["flagged_rate"]
    calibration = summary["calibration"]
    are = "is" if 1 in (share["hits"], share["n"]) else "are"
    lines = [
        f"{share['hits']} of {counted(share['n'], 'prompt', 'prompts')} {are} above the threshold "
        f"{calibration['threshold']:.4g} ({share['rate']:.1%}, 95 % interval {share['low']:.1%} to "
        f"{share['high']:.1%}); {summary['expected_by_chance']:.1f} are expected there by chance, "
        f"so many or more with probability {summary['chance_p_value']:.2g}."
    ]
    near = summary["near_rate"]
    if near["hits"]:
        lines.append(
            f"{near['hits']} of them {'is' if near['hits'] == 1 else 'are'} near a memorized one "
            f"({near['rate']:.1%} of all, 95 % interval {near['low']:.1%} to {near['high']:.1%})."
        )
    if copied := summary["counts"]["copied"]:
        came = "prompt came" if copied == 1 else "prompts came"
        lines.append(f"{copied} {came} back as a copy of a training image: look at the report.")
    lines += [
        f"{name}: {group['hits']} of {group['n']}{near_ones(group['near'], group['hits'])}"
        for name, group in summary["groups"].items()
    ]
    similarity = summary["similarity"]
    if similarity and similarity["copies"]:
        copies = similarity["copies"]
        images = counted(copies["n"], "image", "images")
        them = "it" if share["hits"] == 1 else "them"
        are = "is a copy" if 1 in (copies["hits"], copies["n"]) else "are copies"
        lines.append(
            f"{copies['hits']} of {images} generated for {them} {are} of a training image."
        )
    lines += [f"Caveat: {caveat}" for caveat in summary["caveats"]]
    lines.append(f"Report: {result.folder / 'report.html'}")
    return "\n".join(map(visible, lines))


def _training_images(audit: "LoraAudit") -> Table:
    """Return the training images, those that come back first."""
    rows = [
        [audit.training.images[v.image].name, v.verdict, f"{v.similarity:.2f}", f"{v.control:.2f}",
         str(v.attracted), audit.training.images[v.image].caption[:60]]
        for v in audit.ranked[:SHOWN]
    ]  # fmt: skip
    title = "Training images, nearest first" + _left(audit.verdicts)
    return title, ["image", "verdict", "similarity", "LoRA off", "nearest of", "caption"], rows


def _lora_verdict(audit: "LoraAudit") -> str:
    """Return the headline, what carries it, what to do, and where to look."""
    lines = [audit.headline.text, audit.positive_control.detail, audit.thresholds.method]
    lines += [f"Warning: {text}" for text in (*audit.lora.warnings, *audit.training.warnings)]
    if audit.attack:
        out = audit.attack.extracted
        lines.append(
            f"The extraction attack brought out {out.count} of {out.total} training images."
        )
    if audit.epochs:
        best = audit.best_epoch
        lines.append(
            "No saved epoch stays within the controls." if best is None else
            f"The last epoch that stays within the controls: {audit.epochs[best].name}"
        )  # fmt: skip
    lines += [f"{cause.change} {cause.flags}".strip() for cause in audit.causes]
    lines.append(f"Report: {audit.folder / 'report.html'}")
    return "\n".join(map(visible, lines))


def _left(rows: Any) -> str:
    """Return how many rows a table does not show."""
    return f" ({len(rows) - SHOWN} more in the report)" if len(rows) > SHOWN else ""
