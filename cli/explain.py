"""`unmemorize explain`: the words of a prompt that carry its score."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .common.options import AnswerOptions, ModelOptions, Prompts, Seeds, Steps, Texts, takes_options
from .common.terminal import LONGEST, Table, answering, bar, print_json, print_table


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(AnswerOptions, ModelOptions):
    """Of `unmemorize explain`."""

    prompts: Prompts = None
    prompt: Texts = None
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for the coloured prompts, PNG and HTML."),
    ] = None
    seeds: Seeds = 1
    steps: Steps = 1


@takes_options
def explain(options: ExplainOptions) -> None:
    """Show which words of a prompt carry its score, and what happens without them."""
    with answering(options):
        from ..audit.model.parts import explain_prompts

        rows = explain_prompts(
            options.subject, files=options.prompts or (), texts=options.prompt or (),
            seeds=options.seeds, steps=options.steps, output=options.output, bars=bar,
        )  # fmt: skip
    if options.as_json:
        print_json({"schema_version": 1, "results": rows})
        return
    for row in rows:
        print_table(*_table(row))


def _table(row: Mapping[str, Any]) -> Table:
    """Return the words of one prompt, most significant first."""
    pairs = sorted(zip(row["words"], row["significance"], strict=True), key=lambda p: -p[1])
    left_out = {occlusion["word"]: occlusion for occlusion in row["occlusions"]}
    return row["prompt"][:LONGEST], ["word", "significance", "score without it"], [
        [word, f"{value:.4g}", f"{left_out[word]['score_after']:.4g} (of "
         f"{left_out[word]['score_before']:.4g})" if word in left_out else ""]
        for word, value in pairs
    ]  # fmt: skip
