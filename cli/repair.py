"""`unmemorize repair`: a LoRA that gives training images back, changed until it does not."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..shared.wording import visible
from .common.options import (
    AnswerOptions,
    GenerationSteps,
    InstancePrompt,
    ModelOptions,
    Prompts,
    Trigger,
    settings_in,
    takes_options,
)
from .common.terminal import FOUND, NOTHING_FOUND, answering, bar, print_json, print_table

if TYPE_CHECKING:
    from ..audit.lora.repair.result import Repair

EXIT_CODES = """
Exit codes: 0 repaired, and the audit of the written file says that none came back; 3 repaired so
that no image comes back as a copy, but some come nearer than controls do, or the audit gives no
verdict; 1 failed: nothing to repair, or nothing that was tried holds, and no LoRA was written;
2 wrong usage; 130 interrupted.
"""


@dataclass(frozen=True, kw_only=True)
class RepairOptions(AnswerOptions, ModelOptions):
    """Of `unmemorize repair`; the defaults are those of `RepairConfig` and `LoraAuditConfig`."""

    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder that --lora was trained on."),
    ] = None
    output: Annotated[Path, typer.Option(help="The repaired LoRA, a .safetensors file.")] = Path(
        "repaired.safetensors"
    )
    report: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the page and both audits. Default: unmemorize-repair."),
    ] = None
    method: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="strength (the whole LoRA weaker), filtering (directions that do not align with "
            "the base model dropped, no data), sensitive (directions that memorized captions hang "
            "on dropped), distillation; repeatable. Default: all, and what keeps most is taken."
        ),
    ] = None
    prompts: Prompts = None
    held_out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Images of the same subject that were not trained on."),
    ] = None
    instance_prompt: InstancePrompt = None
    trigger: Trigger = None
    captions: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, metavar="N", help="Captions that are asked. Default: 100."),
    ] = None
    images_per_prompt: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Images of each caption. Default: 4."),
    ] = None
    attack: Annotated[
        bool, typer.Option(help="Also try to extract training images, before and after.")
    ] = True
    include_images: Annotated[
        bool, typer.Option("--include-images", help="Show training images in the pages unblurred.")
    ] = False
    generation_steps: GenerationSteps = 20
    overwrite: Annotated[
        bool, typer.Option(help="Replace the output file, and another repair in the folder.")
    ] = False

    def check(self) -> None:
        """Refuse a repair without what it repairs.

        Raises:
            typer.BadParameter: Names the option.
        """
        if self.lora is None:
            raise typer.BadParameter("A repair needs --lora, the file that gives images back.")
        if self.images is None:
            raise typer.BadParameter(
                "A repair needs --images, the folder that --lora was trained on: without it nobody "
                "can tell what comes back."
            )
        if self.frames is not None:
            raise typer.BadParameter("--frames: a repair draws images and no videos.")


@takes_options
def repair(options: RepairOptions) -> None:
    """Repair a LoRA that gives training images back, without training it again.

    The LoRA is audited, several ways are tried, what gives no image back and keeps most is written,
    and the written file is audited on noises that no trial has seen. Interrupted, the same command
    continues.
    """
    options.check()
    with answering(options, resumes=True):
        from ..audit.lora.config import LoraAuditConfig
        from ..audit.lora.repair.config import RepairConfig
        from ..audit.lora.repair.page import to_document
        from ..audit.lora.repair.run import run_repair

        given = settings_in(options, LoraAuditConfig)
        del given["output"]
        given = {name: value for name, value in given.items() if value is not None}
        if not options.attack:
            given["attack_images"] = 0
        config = RepairConfig(audit=LoraAuditConfig(**given), output=options.output)
        if options.report is not None:
            config = replace(config, report=options.report)
        if options.method:
            config = replace(config, methods=tuple(options.method))
        done = run_repair(config, bar, lambda sentence: typer.echo(visible(sentence), err=True))
    if options.as_json:
        print_json(to_document(done) | {"output": str(done.output), "report": str(done.folder)})
        raise typer.Exit(NOTHING_FOUND if done.clear else FOUND)
    rows = [[words, f"{before.count} of {before.total}", f"{after.count} of {after.total}"]
            for words, before, after in done.by_words]  # fmt: skip
    print_table("Images that are copies, by what was asked", ["asked", "before", "after"], rows)
    typer.echo(_verdict(done))
    raise typer.Exit(NOTHING_FOUND if done.clear else FOUND)


def _verdict(done: "Repair") -> str:
    """Return the closing sentences: what was done, against the baseline, and where to look."""
    lines = [done.headline, f"The audit of the file: {done.after.headline.text}"]
    lines += [f"Taken: {done.chosen.method}, {done.chosen.left:.0%} left."]
    baseline = done.best_of.get("strength")
    if baseline and done.chosen.method != "strength":
        lines.append(f"A lower strength alone keeps {baseline.kept:.0%} at the same point.")
    lines += [f"Written: {done.output}", f"Report: {done.folder / 'repair.html'}"]
    return "\n".join(map(visible, lines))
