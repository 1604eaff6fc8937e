"""A training folder once more without its duplicates, for trainers that take a folder alone."""

import csv
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ...shared.files.prompts import FILE_COLUMNS, IMAGE_SUFFIXES, METADATA, PromptError
from ...shared.files.storage import writing
from .duplicates import FolderDuplicates
from .training_set import read_files


def link_kept(found: FolderDuplicates, target: Path) -> int:
    """Make a folder like the examined one without the surplus images; return its images' number.

    Regularisation images come along. Images are hard links where the disk can make them, so they
    take no space. Captions are copies, since programs write into them. Rows of tables that name a
    surplus image are left out.

    Raises:
        PromptError: `target` is not empty or lies in the folder, or a table is a parquet file.
        StorageError: Nothing can be written there.
    """
    target = Path(os.path.abspath(target))
    if found.folder in (target, *target.parents):
        raise PromptError(f"{target} lies in the training folder: choose one beside it.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PromptError(f"{target} is not empty: choose a new folder.")
    surplus = {found.folder / name for name in found.surplus}
    files = list(read_files(found.folder))
    if tables := [path for path in files if path.name in METADATA and path.suffix == ".parquet"]:
        raise PromptError(f"{tables[0]} cannot be written without some rows: make it a .jsonl.")
    kept = {path.with_suffix("") for path in files if _is_image(path) and path not in surplus}
    beside = {path.with_suffix("") for path in surplus} - kept
    images = 0
    for path in files:
        if path in surplus or (path.with_suffix("") in beside and not _is_image(path)):
            continue
        place = target / path.relative_to(found.folder)
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            _put(path, place, surplus)
        images += _is_image(path)
    return images


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _put(path: Path, place: Path, surplus: set[Path]) -> None:
    """Put one file in its place."""
    if path.name in METADATA:
        place.write_bytes(_without_rows(path, surplus).encode())
    elif _is_image(path):
        try:
            os.link(path, place)
        except OSError:  # another disk, or one without hard links
            shutil.copy2(path, place)
    else:
        shutil.copy2(path, place)


def _without_rows(table: Path, surplus: set[Path]) -> str:
    """Return a table's text without the rows that name a surplus image."""

    def stays(row: Mapping[str, str]) -> bool:
        named = next((row[column] for column in FILE_COLUMNS if row.get(column)), None)
        return named is None or Path(os.path.normpath(table.parent / named)) not in surplus

    text = table.read_text("utf-8-sig")
    if table.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, reader.fieldnames or (), lineterminator="\n")
        writer.writeheader()
        writer.writerows(filter(stays, reader))
        return stream.getvalue()
    lines = [line for line in text.splitlines() if line.strip()]
    return "".join(f"{line}\n" for line in lines if stays(json.loads(line)))
