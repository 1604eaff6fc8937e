"""`unmemorize demo`: the bundled model, and whether it is whole."""

import typer

from .common.options import AnswerOptions, takes_options
from .common.terminal import FAILED, answering, print_json, print_table


@takes_options
def demo(options: AnswerOptions) -> None:
    """Say where the demo model is, how large, and whether its files are the committed ones."""
    with answering(options):
        from ..demo import describe

        state = describe()
    if options.as_json:
        print_json(state)
    else:
        print_table("Demo model", ["what", "value"], list(state.items()))
    raise typer.Exit(0 if state["intact"] else FAILED)
