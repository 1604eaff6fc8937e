"""Make the benchmarks' models: ``python tests/benchmarks/make_models.py [NAME ...]``.

Killed at any moment, the same command continues.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench_models import FOLDER, video
from bench_models.recipes import RECIPES
from bench_models.train import make

MAKERS = {name: partial(make, recipe) for name, recipe in RECIPES.items()} | {"video": video.make}
"""By name, what makes a model in a folder of its own."""


def main(argv: Sequence[str] | None = None) -> None:
    """Make the named models, or all; those that are there already stay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MAKERS))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where they lie")
    parser.add_argument("--short", action="store_true", help="a few steps: proves that it runs")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(MAKERS):
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(MAKERS)}")
    if args.short and args.folder == FOLDER:
        parser.error("--short would stand in the models' place: name another --folder")
    for name in args.names or MAKERS:
        MAKERS[name](args.folder / name, short=args.short)
        print(f"{name}: {args.folder / name / 'model'}")


if __name__ == "__main__":
    main()
