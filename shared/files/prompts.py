"""Prompts from text files, tables and training folders; whatever they contain stays data."""

import csv
import io
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..dependencies import require
from ..wording import counted
from .leftovers import without_leftovers
from .schema import Reader
from .unused import unused_files

logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "caption", "text", "Prompt", "Caption", "Text", "TEXT")
"""Column or field that holds the prompt, first match wins."""
FILE_COLUMNS = ("file_name", "file", "image", "path")
CAPTION_SUFFIXES = (".txt", ".caption")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
LONGEST = 300
"""Characters of a library's message."""
HALVES = re.compile("[\ud800-\udfff]")
MARKS = ("[trigger]", "[name]")
"""What stands in captions for the trigger word, which ai-toolkit puts in its place."""
SYNTAX = re.compile(
    r"\([^()]+:\s*-?\d*\.?\d+\)|\{[^{}]*\|[^{}]*\}|(?<!\w)__[\w/-]+__(?!\w)"
    r"|<(lora|lyco|hypernet|embedding):[^<>]+>"
)
"""Signs of ComfyUI, A1111 and their extensions."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class PromptError(ValueError):
    """A prompt file cannot be read or holds no prompts."""


ROWS = Reader(PromptError, "JSON", "Write one JSON object a line.")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and where it came from."""

    text: str
    """As read; only the line's end and a byte-order mark are removed."""
    source: str
    """`file:line` or the image's file name."""
    image: Path | None = None
    """Training image it describes."""


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Distinct prompts in order of first occurrence."""

    prompts: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]
    """Per prompt, all places where it stands."""
    images: tuple[tuple[Path, ...], ...]
    """Per prompt, the training images it describes."""
    read: int
    """Prompts before cleaning."""
    empty: int
    """Dropped because nothing but white space stood there."""

    @property
    def duplicates(self) -> int:
        """Return how many prompts were merged into an earlier, equal one."""
        return self.read - self.empty - len(self.prompts)


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a txt, csv, jsonl or parquet file, or of a training folder.

    Raises:
        PromptError: No such file, an unknown suffix, no prompt column, or not a single prompt.
    """
    path = Path(path)
    if not path.exists():
        raise PromptError(f"No such file or folder: {path}. Give prompts as .txt, .csv, .jsonl, "
                          ".parquet, or a training folder with captions.")  # fmt: skip
    readers: dict[str, Callable[[Path], Iterable[Prompt]]] = {
        ".txt": _read_txt, ".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl, ".parquet": _read_parquet,
    }  # fmt: skip
    if not path.is_dir() and not path.is_file():
        raise PromptError(f"{path} is no regular file: it would be waited for. Give a file.")
    reader = _read_folder if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise PromptError(
            f"{path.name} ends in {path.suffix or 'nothing'!r}, expected one of "
            f"{', '.join(readers)} or a training folder."
        )
    try:
        prompts = list(reader(path))
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {_line(error)}.") from error
    if not any(prompt.text.strip() for prompt in prompts):
        raise PromptError(
            f"{path} holds no prompts: it is empty or has nothing but white space. "
            "Write one prompt a line (.txt) or fill the caption column or files."
        )
    _tell_literal(path, prompts)
    return prompts


def _tell_literal(path: Path, prompts: Iterable[Prompt]) -> None:
    """Name what other programs read as a sign, and is asked for as it stands."""
    texts = [prompt.text for prompt in prompts]
    if marked := sum(any(mark in text for mark in MARKS) for text in texts):
        logger.warning(
            "%s: %s %s or %s, where a trainer puts its trigger word, and %s asked for as %s. Ask "
            "for the word itself: write it in place of the mark into a copy of the captions, and "
            "give that as --prompts (an audit with --lora and --images takes --trigger WORD).",
            path.name,
            counted(marked, *(("caption has", "captions have") if path.is_dir()
                              else ("prompt has", "prompts have"))), *MARKS,
            *(("is", "it stands") if marked == 1 else ("are", "they stand")),
        )  # fmt: skip
    # Captions in a training folder were trained as they stand, whatever their signs.
    special = 0 if path.is_dir() else sum(SYNTAX.search(text) is not None for text in texts)
    if special:
        logger.warning(
            "%s: %s signs of other programs (weights as in (word:1.2), choices as in {a|b}, "
            "__wildcards__, <lora:name:1>), asked for as they stand: nothing here reads them. "
            "Write into a copy what the model was really given.",
            path.name, counted(special, "prompt has", "prompts have"),
        )  # fmt: skip


def clean(prompts: Iterable[Prompt]) -> PromptSet:
    """Drop empty prompts with a warning and merge equal ones; texts are not changed."""
    merged: dict[str, list[Prompt]] = {}
    read = empty = 0
    for prompt in prompts:
        read += 1
        if prompt.text.strip():
            merged.setdefault(prompt.text, []).append(prompt)
        else:
            empty += 1
    if empty:
        noun, verb = "prompt" if read == 1 else "prompts", "is" if empty == 1 else "are"
        logger.warning("%d of %d %s %s empty and left out.", empty, read, noun, verb)
    if duplicates := read - empty - len(merged):
        one, many = "prompt repeats an earlier one and is", "prompts repeat an earlier one and are"
        logger.warning("%d %s merged with it.", duplicates, one if duplicates == 1 else many)
    return PromptSet(
        prompts=tuple(merged),
        sources=tuple(tuple(p.source for p in group) for group in merged.values()),
        images=tuple(
            tuple(dict.fromkeys(p.image for p in group if p.image)) for group in merged.values()
        ),
        read=read,
        empty=empty,
    )


def _line(error: Exception) -> str:
    """Return what a library says, in one line."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:LONGEST].rstrip(".")


def _text(path: Path) -> str:
    """Return the file as text; control characters other than line ends stay."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8 and try again."
        ) from error


def _lines(text: str) -> list[str]:
    """Split at newlines only: `str.splitlines` also splits at form feeds and U+2028."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def _read_txt(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(_lines(_text(path)), 1):
        yield Prompt(text=line, source=f"{path.name}:{number}")


def _read_csv(path: Path) -> Iterator[Prompt]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = _text(path)
    if not text.strip():
        return
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        yield from _from_rows(path, _whole(path, rows), lambda index: rows.line_num)
    except csv.Error as error:
        raise PromptError(f"{path} is not a valid table: {error}.") from error


def _whole(path: Path, rows: csv.DictReader) -> Iterator[dict[str, str]]:
    """Yield rows, refusing those with more fields than the header: a prompt's own commas."""
    for row in rows:
        if None in row:
            header = len(rows.fieldnames or ())
            raise PromptError(
                f"{path.name}: row {rows.line_num} has {header + len(row[None])} fields, the "
                f"header {header}. Put text with a comma in double quotes, or write one prompt a "
                "line into a .txt file."
            )
        yield row


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    def rows() -> Iterator[Any]:
        for number, line in enumerate(_lines(_text(path)), 1):
            numbers.append(number)
            if line.strip():
                yield ROWS.parse(line, f"{path}:{number}")

    numbers: list[int] = []
    yield from _from_rows(path, rows(), lambda index: numbers[-1])


def _read_parquet(path: Path) -> Iterator[Prompt]:
    parquet = require("pyarrow.parquet", purpose="Reading prompts from parquet", extra="parquet")
    arrow = require("pyarrow", purpose="Reading prompts from parquet", extra="parquet")
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        wanted = [name for name in names if name in (*COLUMNS, *FILE_COLUMNS)]
        if wanted and (unused := [name for name in names if name not in wanted]):
            logger.warning("%s", _told_of_fields(path, unused))
        rows = (
            # A file without a known column has no rows to show, but its names go into the error.
            row if wanted else dict.fromkeys(names)
            for batch in file.iter_batches(columns=wanted or names[:1])
            for row in batch.to_pylist()
        )
        yield from _from_rows(path, rows, lambda index: index + 1)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise PromptError(f"{path} is not a readable parquet file: {_line(error)}.") from error


def _from_rows(path: Path, rows: Iterable[Any], line: Callable[[int], int]) -> Iterator[Prompt]:
    """Yield prompts from mappings or plain strings."""
    unused: dict[str, None] = {}
    for index, row in enumerate(rows):
        where = f"{path.name}:{line(index)}"
        if isinstance(row, str):
            yield Prompt(text=_paired(row), source=where)
            continue
        names = list(row) if isinstance(row, dict) else []
        column = next((name for name in COLUMNS if name in names), None)
        if column is None:
            there = ", ".join(map(repr, names))[:LONGEST] or type(row).__name__
            raise PromptError(f"{where} has no column for prompts: found {there}, expected one of "
                              f"{', '.join(COLUMNS[:3])}.")  # fmt: skip
        value = row[column]
        if value is not None and not isinstance(value, str):
            raise PromptError(f"{where}: {column!r} holds {type(value).__name__}, expected text.")
        file = next((row[name] for name in FILE_COLUMNS if isinstance(row.get(name), str)), None)
        unused |= dict.fromkeys(n for n in names if n not in (column, *FILE_COLUMNS) and row[n])
        text = _paired(value or "")
        yield Prompt(text=text, source=where, image=_inside(path.parent, file))
    if unused:
        logger.warning("%s", _told_of_fields(path, unused))


def _told_of_fields(path: Path, names: Iterable[str]) -> str:
    shown = [name if len(name) <= 40 else f"{name[:40]}…" for name in names]
    return (
        f"{path.name} has fields that nothing here reads ({', '.join(map(repr, shown[:20]))}): "
        "each row is its text alone, asked for by this program's own seeds and settings."
    )


def _paired(text: str) -> str:
    """Return a text without halves of characters, which JSON can spell and no tokenizer takes."""
    return HALVES.sub("\ufffd", text)


def _inside(folder: Path, name: str | None) -> Path | None:
    """Return the named file when it exists below `folder`; tables may name anything."""
    if not name or "\0" in name or HALVES.search(name):
        return None
    for each in dict.fromkeys((name, name.replace("\\", "/"))):  # as Windows writes paths
        image = folder / each
        if folder.resolve() in image.resolve().parents and image.is_file():
            return image
    return None


def _read_folder(folder: Path) -> Iterator[Prompt]:
    """Yield the captions of a training folder: kohya sidecars, or a diffusers metadata table."""
    tables, left = without_leftovers(
        sorted(path for name in METADATA for path in folder.rglob(name)), folder
    )
    for sentence in left:
        logger.warning("%s", sentence)
    for table in tables:
        for prompt in read_table(table):
            yield replace(prompt, source=f"{table.relative_to(folder).as_posix()}"
                                         f":{prompt.source.rpartition(':')[2]}")  # fmt: skip
    if tables:
        return
    images = image_files(folder)
    if not images:
        raise PromptError(f"{folder} holds no images with captions and no {', '.join(METADATA)}. "
                          "Give the folder that the training reads.")  # fmt: skip
    longer = 0
    for image in images:
        caption = caption_of(image)
        lines = (caption_text(image) or "").splitlines()
        longer += lines[:1] == [caption] and any(line.strip() for line in lines[1:])
        yield Prompt(text=caption, source=image.relative_to(folder).as_posix(), image=image)
    if longer:
        have = counted(longer, "caption file has", "caption files have")
        logger.warning("%s further lines, which sd-scripts does not read and nothing asks for. "
                       "Join them into one line where the trainer read them.", have)  # fmt: skip


def image_files(folder: Path) -> list[Path]:
    """Return what a training reads as an image below a folder, in order; nothing is opened.

    What else is named as an image is logged as a warning.
    """
    named = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    images, left = without_leftovers(named, folder)
    for sentence in (*left, *unused_files(sorted(folder.rglob("*")), images, folder)):
        logger.warning("%s", sentence)
    return images


def read_table(path: Path) -> Iterator[Prompt]:
    """Return the rows of a metadata file of a training folder; `image` is None for absent files.

    Raises:
        PromptError: It is not a table, or a row has no column for prompts.
    """
    reader = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[path.suffix]
    return reader(path)


def caption_of(image: Path) -> str:
    """Return what an image is trained on: the file beside it, or its folder's name.

    Of several lines the first, as kohya's scripts read them; all where `MARKS` show that
    ai-toolkit does, which reads the whole file.

    Raises:
        PromptError: The file beside it is not UTF-8.
    """
    text = caption_text(image)
    if text is None:
        number, _, name = image.parent.name.partition("_")
        return name if number.isdecimal() else ""
    if any(mark in text for mark in MARKS):
        return text.strip()
    return (_lines(text) or [""])[0]


def caption_text(image: Path) -> str | None:
    """Return the whole caption file beside an image, None where there is none.

    Raises:
        PromptError: It is not UTF-8.
    """
    sidecars = (image.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
    sidecar = next((path for path in sidecars if path.is_file()), None)
    return None if sidecar is None else _text(sidecar)
