"""`unmemorize explain`: the words of a prompt that carry its score."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .common.options import AnswerOptions, ModelOptions, Prompts, Seeds, Steps, Texts, takes_options
from .common.terminal import Table, answering, bar, print_json, print_table, shortened


class Methods(str, Enum):
    """As `shared.words.explanation` names them, which is not loaded for `--help`."""

    leave_out = "leave_out"
    input_gradient = "input_gradient"
    encoder_gradient = "encoder_gradient"


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(AnswerOptions, ModelOptions):
    """Of `unmemorize explain`."""

    prompts: Prompts = None
    prompt: Texts = None
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for the coloured prompts, PNG and HTML."),
    ] = None
    method: Annotated[
        Methods,
        typer.Option(
            help="leave_out: the magnitude without each word, one forward row a word and "
            "seed; of more than 24 words, those that input_gradient ranks first. "
            "input_gradient: at what the text encoder reads. encoder_gradient: at what "
            "it gives, as published."
        ),
    ] = Methods.leave_out
    seeds: Seeds = 1
    steps: Steps = 1


@takes_options
def explain(options: ExplainOptions) -> None:
    """Show which words of a prompt carry its score, and what happens without them."""
    with answering(options):
        from ..audit.model.parts import explain_prompts

        rows = explain_prompts(
            options.subject, files=options.prompts or (), texts=options.prompt or (),
            seeds=options.seeds, steps=options.steps, method=options.method.value,
            output=options.output, bars=bar,
        )  # fmt: skip
    if options.as_json:
        print_json({"schema_version": 1, "results": rows})
        return
    for row in rows:
        print_table(*_table(row))
        for note in row["notes"]:
            typer.echo(note)


def _table(row: Mapping[str, Any]) -> Table:
    """Return the words of one prompt, most significant first, those not measured last."""
    values = row["significance"]
    order = sorted(range(len(values)), key=lambda i: (values[i] is None, -(values[i] or 0)))
    left_out = {occlusion["index"]: occlusion for occlusion in row["occlusions"]}
    measured = "prediction changes by" if row["method"] == "leave_out" else "gradient"
    return shortened(row["prompt"]), ["word", measured, "magnitude without it"], [
        [row["words"][i], "not measured" if values[i] is None else f"{values[i]:.4g}",
         f"{left_out[i]['score_after']:.4g} (of {left_out[i]['score_before']:.4g})"
         if i in left_out else ""]
        for i in order
    ]  # fmt: skip
