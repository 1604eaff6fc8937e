"""`unmemorize dedupe`: duplicates in a training folder, and lists without them for trainers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .common.options import AnswerOptions, OutputFolder, takes_options
from .common.terminal import FOUND, NOTHING_FOUND, answering, bar, print_json, print_table

if TYPE_CHECKING:
    from ..audit.lora.duplicates import FolderDuplicates

EXIT_CODES = """
Exit codes: 0 no duplicates, 3 duplicates found, 1 failed, 2 wrong usage, 130 interrupted.
"""


@dataclass(frozen=True, kw_only=True)
class DedupeOptions(AnswerOptions):
    """Of `unmemorize dedupe`."""

    folder: Annotated[Path, typer.Argument(help="Folder that the training reads.")]
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Equal files alone; needs neither SSCD nor time."),
    ] = False
    linked: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also make this new folder without the duplicates, of hard links that "
                     "take no space: for trainers that take a folder and no list."),
    ] = None  # fmt: skip
    output: OutputFolder = Path("duplicates")


@takes_options
def dedupe(options: DedupeOptions) -> None:
    """Find duplicates in a training folder: equal files, and crops, mirrored or saved again.

    Writes the groups, a page to look at, and a list without the duplicates that trainers take.
    Nothing in the folder is deleted or changed.
    """
    with answering(options, resumes=True):
        from ..audit.lora.duplicates import as_document, find_in_folder, write_lists
        from ..audit.lora.linked import link_kept

        found = find_in_folder(options.folder, method="hash" if options.exact else "sscd", bars=bar)
        write_lists(found, options.output)
        linked = None if options.linked is None else link_kept(found, options.linked)
    if options.as_json:
        print_json(as_document(found))
    else:
        rows = [
            [group.kept.name, 1 + len(group.others), "yes" if group.exact else "no",
             f"{group.similarity:.3f}", group.captions]
            for group in found.groups
        ]  # fmt: skip
        print_table(found.headline, ["kept", "images", "equal", "similarity", "captions"], rows)
        for line in found.warnings:
            typer.echo(f"Note: {line}")
        for line in _ways(found, options, linked):
            typer.echo(line)
    raise typer.Exit(FOUND if found.groups else NOTHING_FOUND)


def _ways(found: "FolderDuplicates", options: DedupeOptions, linked: int | None) -> Iterator[str]:
    """Yield where the lists are, and which option of which trainer takes them."""
    from ..audit.lora.duplicates import KEPT, PAGE

    yield f"Page: {options.output / PAGE}"
    kept = options.output.resolve() / KEPT
    if len(found.repeats) == 1:
        yield f"sd-scripts: --in_json {kept} --dataset_repeats {found.repeats[0]}"
    else:
        yield (
            f"sd-scripts: --linked, since images are repeated {found.repeats[0]} to "
            f"{found.repeats[-1]} times and its --in_json has one number for all."
        )
    yield f"ai-toolkit: dataset_path: {kept} (in place of folder_path)"
    if linked is None:
        yield "OneTrainer, diffusers' scripts and others take a folder: type --linked NEW_FOLDER."
    else:
        folder = options.linked
        yield f"Any trainer: {folder} in place of {options.folder} ({linked} images)."
