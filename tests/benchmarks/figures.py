"""The one place that writes figures: docs/figures.json, and from it the numbers in the pages.

A benchmark hands what it measured to `record`, under the keys that the issues name:

    record({"words.demo.spearman": mean_of(correlations), "words.demo.top1": share_of(hits)},
           command_of("words", argv))

Keys are dotted lower-case words, models as in `models.MODELS`. They hold the shipped default;
rivals stand under keys that begin with `rivals.`, other settings under `grid.`.

In a page, a comment with a key follows the number, and the number's own form is its format:

    .98<!--words.demo.top1-->               the value, with as many decimals
    .98 (.95 to 1.00)<!--words.demo.top1--> the value and its 95 % interval
    .95 to 1.00<!--words.demo.top1-->       the interval alone
    98 %<!--words.demo.top1-->              any of these in percent
    47 of 48<!--words.demo.top1-->          a share as a count

Run alone (``make figures``), the pages are filled again, as after an edit.
"""

import json
import math
import platform
import random
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from unmemorize.audit.common.result import versions
from unmemorize.shared.files.storage import write_text
from unmemorize.shared.score.rates import clopper_pearson

ROOT = Path(__file__).resolve().parents[2]
SEEDS = {"bootstrap": [0], "copies": [0, 1], "detection": [0, 1, 2, 3], "lora_audit": [0],
         "mitigation": [0, 1, 2, 3], "trainers": [0, 1, 2], "words": [0]}  # fmt: skip
"""By benchmark, of what it scores, draws or trains."""
BOOTSTRAPS = 2000
KEY = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)+")
COMMAND = re.compile(r'(make demo|make fuzz|make bench NAME=(?P<name>\w+))( ARGS="[^"]+")?')
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
MARKED = re.compile(
    r"(?<![\w.,])(?P<text>N of N|(?:N(?: %)? \()?N to N(?: %)?\)?|N(?: %)?)"
    r"<!--(?P<key>[^\s>]+)-->(?! ?%)".replace("N", NUMBER.pattern)
)
"""A number in a page and the key after it; the sign of a percentage belongs before the key."""


class Figure(NamedTuple):
    """A measured number."""

    value: float | None
    low: float | None
    """Ends of the 95 % interval; None without one."""
    high: float | None
    n: int
    """What was counted or averaged over: prompts, images, runs."""


def share_of(hits: Sequence[bool]) -> Figure:
    """Return a share with its Clopper-Pearson interval."""
    return count_of(sum(hits), len(hits))


def count_of(hits: int, n: int) -> Figure:
    """Return the share that `hits` of `n` are, with its Clopper-Pearson interval."""
    low, high = clopper_pearson(hits, n)
    return Figure(hits / n, low, high, n)


def mean_of(values: Sequence[float]) -> Figure:
    """Return a mean with its bootstrap interval over the values; one value has none."""
    if len(values) == 1:
        return plain(values[0], 1)
    draw = random.Random(0)
    means = sorted(statistics.mean(draw.choices(values, k=len(values))) for _ in range(BOOTSTRAPS))
    low, high = means[int(0.025 * BOOTSTRAPS)], means[int(0.975 * BOOTSTRAPS)]
    return Figure(statistics.mean(values), low, high, len(values))


def plain(value: float, n: int) -> Figure:
    """Return a number without an interval."""
    return Figure(value, None, None, n)


def command_of(name: str, arguments: Sequence[str] | None = None) -> str:
    """Return what is typed to run a benchmark; where files lie is left out.

    Args:
        name: Of its file.
        arguments: As `argparse` takes them.
    """
    typed = shlex.join(sys.argv[1:] if arguments is None else arguments)
    typed = re.sub(r" ?--(?:work|output|art)[ =](?:'[^']*'|\S+)", "", typed).strip()
    return f"make bench NAME={name}" + (f' ARGS="{typed}"' if typed else "")


def record(figures: Mapping[str, Figure], command: str, *, output: Path | None = None) -> None:
    """Write figures in place of those of the same keys, fill the pages, and print a table.

    They go to docs/figures.json and, as the output of this run, to bench.json.

    Args:
        figures: By key.
        command: What prints them: `make bench NAME=...`, `make fuzz` or `make demo`.
        output: Takes them instead, for a trial; docs/figures.json and the pages stay as they are.

    Raises:
        ValueError: A key, the command or a number is not of the promised form.
    """
    if not COMMAND.fullmatch(command):
        raise ValueError(
            f'the command is `make demo` or `make bench NAME=... [ARGS="..."]`, got {command!r}.'
        )
    made = {}
    for key, figure in figures.items():
        if not KEY.fullmatch(key):
            raise ValueError(f"a key is made of dotted lower-case words, got {key!r}.")
        if not all(number is None or math.isfinite(number) for number in figure):
            raise ValueError(f"{key}: expected finite numbers or None, got {figure}.")
        made[key] = {
            name: None if number is None else float(f"{number:.6g}")
            for name, number in figure._asdict().items()
        } | {"n": int(figure.n), "command": command}
    for path in (output,) if output else (ROOT / "docs" / "figures.json", ROOT / "bench.json"):
        _merge(path, made)
        print(f"{len(made)} figures in {path}")
    if output is None:
        fill_pages()
    print("\n| figure | value | low | high | n |\n|---|---|---|---|---|")
    for key, figure in sorted(figures.items()):
        cells = ("" if number is None else f"{number:.4g}" for number in figure)
        print(f"| {key} | {' | '.join(cells)} |")


def _merge(path: Path, made: Mapping[str, dict]) -> None:
    """Put figures into a file, one line each, under the versions of this run."""
    kept: dict = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    processor = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    about = kept.get("about", {}) | versions() | {"processor": processor, "seeds": SEEDS}
    lines = sorted((kept | made | {"about": about}).items())
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in lines)
    write_text(path, f"{{\n{text}\n}}\n")


def fill(page: str, figures: Mapping[str, dict]) -> str:
    """Return a page with the numbers before keys as `figures` has them.

    Raises:
        ValueError: A key is unknown, or stands after what is no number in one of the forms.
    """
    if bare := re.search(r".{0,30}<!--[^\s>]+-->", MARKED.sub("", page)):
        raise ValueError(
            f"{bare[0]!r}: before a key stands a number in one of the forms that the head of "
            "tests/benchmarks/figures.py lists, with `%` before the comment."
        )
    return MARKED.sub(lambda mark: f"{_written(mark, figures)}<!--{mark['key']}-->", page)


def _written(mark: re.Match, figures: Mapping[str, dict]) -> str:
    """Return a figure in the form of the text that stands before its key."""
    text, key = mark["text"], mark["key"]
    if key not in figures:
        raise ValueError(f"docs/figures.json has no figure {key!r}: measure it, or name another.")
    value, low, high, n = (figures[key][field] for field in Figure._fields)
    numbers = NUMBER.findall(text)
    shown = {1: [value], 2: [low, high], 3: [value, low, high]}[len(numbers)]
    if " of " in text:
        if value is None or abs(value * n - round(value * n)) > 0.01:
            raise ValueError(f"{key} is no count of {n}: write its value instead.")
        return f"{round(value * n):,} of {n:,}"
    if None in shown:
        raise ValueError(f"{key} has no interval or no value, and {text!r} shows one.")
    places, unit = len(numbers[0].partition(".")[2]), 100 if "%" in text else 1
    written = iter([_short(number * unit, places) for number in shown])
    return NUMBER.sub(lambda _: next(written), text)


def _short(value: float, places: int) -> str:
    """Return a number as the pages write it: without a zero before the point."""
    text = f"{value:,.{places}f}"
    text = text.removeprefix("-") if not text.strip("-0.") else text
    return re.sub(r"^(-?)0\.", r"\1.", text)


def pages() -> list[Path]:
    """Return the pages whose numbers are filled."""
    docs = ROOT / "docs"
    found = [*docs.glob("*.md"), *docs.glob("trainers/*.md")]
    return [ROOT / "README.md", ROOT / "demo" / "README.md", *sorted(found)]


def fill_pages() -> None:
    """Fill every page from docs/figures.json, and print which changed."""
    figures = json.loads((ROOT / "docs" / "figures.json").read_text("utf-8"))
    for page in pages():
        text = page.read_text("utf-8")
        if (filled := fill(text, figures)) != text:
            write_text(page, filled)
            print(f"{page.relative_to(ROOT)}: numbers filled in")


if __name__ == "__main__":
    fill_pages()
