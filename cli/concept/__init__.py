"""`unmemorize concept`: the files that keep a concept out of a training, made and examined."""

import typer

from . import build, examine, find, layers, learn

app = typer.Typer(
    help="A concept, learnt from images: found in a folder, kept out of a LoRA while it trains.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command()(learn.learn)
app.command(epilog=find.EXIT_CODES)(find.find)
app.command()(layers.layers)
app.command()(build.build)
app.command()(examine.show)
app.command(epilog=examine.EXIT_CODES)(examine.test)
