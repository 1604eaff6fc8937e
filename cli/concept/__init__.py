"""`unmemorize concept`: the files that keep a concept out of a training, made and examined."""

import typer

from . import build, examine, layers

app = typer.Typer(
    help="A concept's subspace, which a LoRA can be kept off while it trains.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command()(layers.layers)
app.command()(build.build)
app.command()(examine.show)
app.command(epilog=examine.EXIT_CODES)(examine.test)
