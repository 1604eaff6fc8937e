"""The command line: one file a command.

Everything heavy is imported inside the commands, so that help and usage errors come at once.
"""

import os
from typing import Annotated

import typer

from . import (
    audit,
    calibrate,
    concept,
    dedupe,
    demo,
    detect,
    doctor,
    explain,
    mitigate,
    repair,
    verify,
)

QUIET = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
app = typer.Typer(
    help="Find training images that a text-to-image model gives back, and the words that do it."
    + "\n\n" + audit.EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip
app.add_typer(concept.app, name="concept")
# Help lists the commands in the order in which they are added.
app.command(epilog=verify.EXIT_CODES)(verify.verify)
app.command(epilog=audit.EXIT_CODES)(audit.audit)
app.command(epilog=repair.EXIT_CODES)(repair.repair)
app.command(epilog=audit.EXIT_CODES)(detect.detect)
app.command()(explain.explain)
app.command(epilog=audit.EXIT_CODES)(mitigate.mitigate)
app.command()(calibrate.calibrate)
app.command(epilog=dedupe.EXIT_CODES)(dedupe.dedupe)
app.command()(demo.demo)
app.command()(doctor.doctor)


def _show_version(asked: bool) -> bool:
    if asked:
        from ..audit.common.result import versions

        typer.echo(versions()["unmemorize"])
        raise typer.Exit
    return asked


@app.callback()
def _options_of_all(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Take what goes before a command."""


def main() -> None:
    """Run the command line."""
    # Threads that wait spin by default, and beside another busy process spinning is what they do
    # most of the time. OpenMP reads this when torch is imported, which only a command does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Libraries that report on their own use to their makers read these when they are imported.
    for name in QUIET:
        os.environ.setdefault(name, "1")
    app()
