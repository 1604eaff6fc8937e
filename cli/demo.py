"""`unmemorize demo`: the bundled models, and whether they are whole."""

import typer

from .common.options import AnswerOptions, takes_options
from .common.terminal import FAILED, answering, print_json, print_table


@takes_options
def demo(options: AnswerOptions) -> None:
    """Say where the demo models are, how large, and whether all files are the committed ones."""
    with answering(options):
        from ..demo import describe

        state = describe()
    if options.as_json:
        print_json(state)
    else:
        print_table("Demo models", ["what", "value"], list(state.items()))
    raise typer.Exit(0 if state["intact"] else FAILED)
