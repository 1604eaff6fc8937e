"""`unmemorize concept find`: the images of a folder that show a learnt concept."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ...shared.wording import visible
from ..common.options import Model, OutputFolder, takes_options
from ..common.terminal import (
    FOUND,
    NOTHING_FOUND,
    SHOWN,
    answering,
    bar,
    print_json,
    print_table,
    shortened,
)
from .options import ConceptOptions

if TYPE_CHECKING:
    from ...audit.concept.finding import Finding

EXIT_CODES = """
Exit codes: 0 no image shows the concept, 3 some do, 1 failed, 2 wrong usage, 130 interrupted.
"""


@dataclass(frozen=True, kw_only=True)
class FindOptions(ConceptOptions):
    """Of `unmemorize concept find`."""

    model: Model  # named here, so that it comes before the other argument
    folder: Annotated[Path, typer.Argument(help="Training folder, with captions or without.")]
    concept: Annotated[
        Path, typer.Option("--concept", help="Made by `unmemorize concept learn` on this model.")
    ]
    controls: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Folder of 8 or more images that resemble FOLDER and lack the concept, 20 are "
            "good: the line is drawn from them. Default: those in the concept's file."
        ),
    ] = None
    output: OutputFolder = Path("unmemorize-concept")
    overwrite: Annotated[bool, typer.Option(help="Replace another job in the folder.")] = False


@takes_options
def find(options: FindOptions) -> None:
    """List the images of a folder that show a concept, whatever their captions say.

    Writes a contact sheet, and a list that --subtract_samples of the trainers takes. Interrupted,
    the same command continues.
    """
    with answering(options, resumes=True):
        from ...audit.concept.find import document, find_concept

        found = find_concept(
            options.subject, options.concept, options.folder, controls=options.controls,
            output=options.output, overwrite=options.overwrite, bars=bar,
        )  # fmt: skip
    if options.as_json:
        print_json(document(found))
    else:
        _say(found)
    raise typer.Exit(FOUND if found.shown else NOTHING_FOUND)


def _say(found: "Finding") -> None:
    if found.shown:
        rows = [
            [f"{image.gain:+.4f}", image.path.name, "yes" if image.named else "NO",
             shortened(image.caption)[:80]]
            for image in found.shown[:SHOWN]
        ]  # fmt: skip
        left = len(found.shown) - SHOWN
        title = (
            f"Images that show it ({left} more in the list)" if left > 0 else "Images that show it"
        )
        print_table(title, ["gain", "image", "named", "caption"], rows)
    lines = [f"{found.headline}.", *found.remarks]
    if found.shown:
        lines.append(f"List for --subtract_samples: {found.folder / 'shown.txt'}")
    lines.append(f"Page: {found.folder / 'report.html'}")
    typer.echo("\n".join(map(visible, lines)))
