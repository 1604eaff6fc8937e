"""`unmemorize audit --concept`: does a LoRA draw a concept, against its base model?"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ...audit.model.config import AuditConfig
from ...shared.wording import visible
from ..common.terminal import (
    FAILED,
    FOUND,
    NOTHING_FOUND,
    Table,
    answering,
    bar,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from ...audit.concept.appearance import Appearance

PROMPTS = 24
"""Ordinary prompts that a concept audit asks, where none are named."""


@dataclass(frozen=True, kw_only=True)
class OfConcept:
    """What only the audit of a LoRA and a concept takes."""

    concept: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Made by `unmemorize concept learn`: does --lora draw the concept?"),
    ] = None
    concept_images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Folder of images of the concept: a word is learnt from them, with --lora and "
            "without, and asked for. SD 1, SD 2, SDXL; takes long."
        ),
    ] = None
    description: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What the concept looks like, in words that do not name it."),
    ] = None


def audit_concept(options: Any, concept: Path) -> int:
    """Draw, judge, print, and return the exit code.

    Args:
        options: Of `unmemorize audit`.
        concept: The concept's file.
    """
    with answering(options, resumes=True):
        from ...audit.concept.check import CheckConfig, check_concept, document
        from ...audit.model.inputs import read_controls, read_named

        subject = options.subject
        prompts: tuple[str, ...] = ()
        if options.prompts:
            prompts = read_named(options.prompts, (), is_demo=subject.is_demo).prompts
        else:
            ordinary = read_controls(options.controls, is_demo=subject.is_demo)[1]
            prompts = ordinary[:: max(1, len(ordinary) // PROMPTS)][:PROMPTS]
        config = CheckConfig(prompts=prompts, description=options.description or "",
            images=options.concept_images,
                             generation_steps=options.generation_steps)  # fmt: skip
        usual = options.output == AuditConfig.output  # another kind of audit, another folder
        done = check_concept(
            subject, concept, config, overwrite=options.overwrite, bars=bar,
            output=Path("unmemorize-concept-audit") if usual else options.output,
        )  # fmt: skip
    if options.as_json:
        print_json(document(done) | {"output": str(done.folder)})
    else:
        print_table(*_ways(done))
        lines = [f"{done.headline}.", *done.remarks, f"Report: {done.folder / 'report.html'}"]
        typer.echo("\n".join(map(visible, lines)))
    if not done.can_judge:
        return FAILED
    return FOUND if done.appears else NOTHING_FOUND


def _ways(done: "Appearance") -> Table:
    """Return how often the concept came, a row a way of asking."""
    from ...audit.common.wording import between, chance
    from ...audit.concept.appearance import TITLES

    rows = [
        [TITLES[each.way], f"{each.counts[0]} of {len(each.on)}", between(*each.interval),
         f"{each.counts[1]} of {len(each.off)}", chance(each.p_value)]
        for each in done.asked
    ]  # fmt: skip
    columns = ["asked", "with the LoRA", "95 % interval", "base model", "p"]
    return f"Images that show {done.called}", columns, rows
