"""What a command shows: progress and errors on stderr, answers on stdout, any text made safe."""

import contextlib
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer
from tqdm.auto import tqdm

from ...shared.dependencies import extra_of, install_line
from ...shared.wording import tells_of_memory, visible

if TYPE_CHECKING:
    from .options import AnswerOptions

NOTHING_FOUND, FAILED, WRONG_USAGE, FOUND, INTERRUPTED = 0, 1, 2, 3, 130
OPTION_NEEDED = ("NotEnoughControls", "TrainedWordsUnknown")
"""Errors that ask for another value or one more option; named, so as not to load them."""
SHOWN = 20
"""Rows of a table of results."""
LONGEST = 300
"""Characters of a prompt."""
PACKAGE = __name__.removesuffix(".cli.common.terminal")
Table = tuple[str, list[str], list[list[str]]]
"""Title, columns and rows."""


class _ShownOnce(logging.Handler):
    """Shows each message once, on stderr, above a running progress bar."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record unless its text was printed before."""
        text = one_paragraph(record.getMessage())
        if text not in self.shown:
            self.shown.add(text)
            tqdm.write(f"{record.levelname.capitalize()}: {text}", file=sys.stderr)


def one_paragraph(text: str) -> str:
    """Return `text` on one line, with characters that do not print as signs."""
    return visible(text.replace("\n", " "))


def shortened(prompt: str) -> str:
    """Return a prompt as tables show it, cut with a sign where it is longer than `LONGEST`."""
    return prompt if len(prompt) <= LONGEST else f"{prompt[:LONGEST]}…"


def bar(description: str, total: int, initial: int, unit: str) -> Any:
    """Return a progress bar on stderr with rate and remaining time."""
    # Where nobody watches, a line every ten seconds is enough.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        desc=description, total=total, initial=initial, unit=unit, file=sys.stderr,
        mininterval=interval, dynamic_ncols=True,
    )  # fmt: skip


def explain_error(error: BaseException) -> str:
    """Return one paragraph that says what happened and, where it is known, what to type."""
    known = type(error).__module__.split(".")[0] == PACKAGE
    if tells_of_memory(error) and not known:
        return (f"Not enough memory: {error}. Try --batch-size 1, a smaller --resolution, or "
                "--dtype float16 on a GPU.")  # fmt: skip
    if isinstance(error, FileNotFoundError) and error.filename is None and not known:
        return ("The folder in which this was started is gone. Change into one that exists, and "
                "type the command again.")  # fmt: skip
    if isinstance(error, OSError) and error.strerror and not known:
        return f"{error.strerror}: {error.filename}."
    if isinstance(error, ModuleNotFoundError):
        return f"{error}. Type: {install_line(extra_of(error.name or ''))}"
    if known or isinstance(error, ValueError | ImportError):
        return str(error) or type(error).__name__
    return (f"Unexpected {type(error).__name__}: {error}. "
            "Add --debug for the place where it happened.")  # fmt: skip


def exit_code_of(error: Exception) -> int:
    """Return 2 where the command line has to change, 1 where something else has to.

    A value that cannot be meant is a plain `ValueError` of this package, wherever it is noticed.
    Files, models and calibrations that cannot be used have errors of their own, and libraries that
    raise a `ValueError` do not speak of the command line.
    """
    if type(error) is not ValueError:
        return WRONG_USAGE if type(error).__name__ in OPTION_NEEDED else FAILED
    *_, (raised_in, _) = traceback.walk_tb(error.__traceback__)
    own = raised_in.f_globals["__name__"].split(".")[0] == PACKAGE
    return WRONG_USAGE if own else FAILED


@contextlib.contextmanager
def answering(options: "AnswerOptions", *, resumes: bool = False) -> Iterator[None]:
    """Run a command: its errors become one paragraph and exit codes, never a traceback.

    While it works, everything that libraries print goes to stderr.

    Args:
        options: With `as_json` a failure also prints ``{"error": ...}`` as the one document on
            stdout; `debug` lets errors through.
        resumes: What was computed is kept, and the same command goes on from there.
    """
    package = logging.getLogger(PACKAGE)
    handler = _ShownOnce()
    package.addHandler(handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not when a test has replaced it
            stream.reconfigure(errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            if not options.debug:
                warnings.simplefilter("ignore")
            yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        goes_on = "continues where it stopped" if resumes else "starts from the beginning"
        _fail(f"Interrupted. The same command {goes_on}.", "Interrupted", as_json=options.as_json)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if options.debug:
            raise
        _fail(one_paragraph(explain_error(error)), type(error).__name__, as_json=options.as_json)
        raise typer.Exit(exit_code_of(error)) from None
    finally:
        package.removeHandler(handler)


def _fail(message: str, error: str, *, as_json: bool) -> None:
    typer.echo(f"Error: {message}" if error != "Interrupted" else message, err=True)
    if as_json:
        print_json({"error": {"type": error, "message": message}})


def print_json(document: Any) -> None:
    """Print one JSON document on stdout, in ASCII so that no terminal can spoil it."""
    typer.echo(json.dumps(document, indent=1, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on stdout; cells may hold anything, markup stays text."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(title)), title_justify="left")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(str(cell))) for cell in row))
    console = Console()
    # Piped into a file a table needs no wrapping to a screen that is not there.
    Console(width=None if console.is_terminal else 160).print(table)
