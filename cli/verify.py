"""`unmemorize verify`: whether a report belongs to given files and is as it was written."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common.options import AnswerOptions, takes_options
from .common.terminal import answering, print_json, print_table

FITS, DOES_NOT_FIT = 0, 3
EXIT_CODES = """
Exit codes: 0 everything that was compared fits, 3 something does not, 1 failed, 2 wrong usage,
130 interrupted.
"""
WORTH = (
    "A digest shows that parts belong together. It is no signature: whoever edits a report can "
    "seal it anew. Compare it with one that the author published: --digest."
)


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(AnswerOptions):
    """Of `unmemorize verify`."""

    report: Annotated[Path, typer.Argument(help="Folder of a LoRA's audit, or its audit.json.")]
    lora: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="LoRA file that the report should be about."),
    ] = None
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Training folder that the report should be about."),
    ] = None
    held_out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of held-out images, where there was one."),
    ] = None
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Base model: `demo`, `demo-flow`, folder, file or hub id."),
    ] = None
    digest: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Digest that the author published, on the model's page for example."),
    ] = None


@takes_options
def verify(options: VerifyOptions) -> None:
    """Check that the report of a LoRA's audit was not edited and belongs to these files.

    Nothing leaves the machine, and nothing in the report is run.
    """
    with answering(options):
        from ..audit.lora.verify import verify_report

        checks = verify_report(
            options.report, lora=options.lora, images=options.images, held_out=options.held_out,
            model=options.model, digest=options.digest,
        )  # fmt: skip
    fits = all(check.fits for check in checks)
    if options.as_json:
        print_json({"schema_version": 1, "fits": fits, "checks": [asdict(c) for c in checks]})
    else:
        rows = [[c.what, "fits" if c.fits else "DOES NOT FIT", c.detail] for c in checks]
        print_table("What was compared", ["what", "result", "detail"], rows)
        if options.digest is None and fits:
            typer.echo(WORTH)
    raise typer.Exit(FITS if fits else DOES_NOT_FIT)
