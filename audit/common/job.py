"""The output folder of an audit: whose it is, what it already holds, and where the job stands."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from ...shared.files.storage import Journal, locked, make_folder, write_text
from ...shared.wording import counted

IDENTITY = "job.json"
LOCK = ".lock"
WRITTEN = (
    "report.html", "results.jsonl", "summary.json", "calibration.json", "audit.json",
    "model_card.md", "badge.svg", "similarity.npz", "images", "journal",
)  # fmt: skip
"""Everything an audit writes; the journal goes last, so that a killed removal can be repeated."""


class FolderTaken(ValueError):
    """The output folder holds something other than this very job."""


class Job:
    """An opened output folder; its journals hold every finished part of the work."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._journals: dict[str, Journal] = {}

    def journal(self, name: str) -> Journal:
        """Return the journal of one phase, read once."""
        if name not in self._journals:
            self._journals[name] = Journal(self.folder / "journal" / f"{name}.jsonl")
        return self._journals[name]


def content_key(*parts: Any) -> str:
    """Return the sha256 of values as JSON: equal content, equal key."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_folder(folder: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse early, before any work, an output folder that is not this job's or cannot be written.

    Args:
        folder: Made when it is missing.
        identity: All that decides the results, as JSON values by readable names.
        overwrite: Accept any folder that can be written.

    Raises:
        FolderTaken: It holds another job, whose differing settings are named, or foreign files.
        StorageError: It is a file, or nothing can be written there.
    """
    make_folder(folder)
    if overwrite:
        return
    found = _read_identity(folder / "journal" / IDENTITY)
    if found is not None and found != _plain(identity) and _has_work(folder):
        raise FolderTaken(_difference(folder, found, _plain(identity)))
    # A kill right after the start leaves a journal folder that does not name its job yet.
    names = {path.name for path in folder.iterdir() if path.suffix != ".part"}
    if found is None and (foreign := sorted(names - {"journal", LOCK})):
        raise FolderTaken(
            f"{folder} exists and holds {counted(len(foreign), 'file that is', 'files that are')} "
            f"not an audit's, such as {foreign[0]!r}. Choose another --output, or add "
            "--overwrite to write into it (only files of an audit's own names are replaced)."
        )


def holds(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Return whether `folder` already holds this very job."""
    return _read_identity(folder / "journal" / IDENTITY) == _plain(identity)


@contextmanager
def open_job(folder: Path, identity: Mapping[str, Any], *, overwrite: bool) -> Iterator[Job]:
    """Claim `folder` for one job; the same job continues, another one is refused.

    Args:
        folder: Already checked by `check_folder`.
        identity: All that decides the results, as JSON values by readable names.
        overwrite: Remove the files of another job; the same job continues all the same.

    Raises:
        FolderTaken: It holds another job; names the settings that differ.
        StorageError: Another process is writing there, or nothing can be written.
    """
    make_folder(folder / "journal")
    with locked(folder / LOCK, owner=str(folder)):
        path = folder / "journal" / IDENTITY
        identity = _plain(identity)
        found = _read_identity(path)
        if found is not None and found != identity:
            if not overwrite:
                raise FolderTaken(_difference(folder, found, identity))
            _remove_results(folder)
        if found != identity:
            write_text(path, json.dumps(identity, indent=1) + "\n")
        yield Job(folder)


def _read_identity(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return {"job": f"{path.name} is damaged"}


def _has_work(folder: Path) -> bool:
    """Return whether anything beyond facts about the model was finished there."""
    journals = (folder / "journal").glob("*.jsonl")
    return any(path.stat().st_size for path in journals if path.name != "model.jsonl")


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(dict(identity))))


def _difference(folder: Path, found: dict[str, Any], identity: dict[str, Any]) -> str:
    names = [name for name in sorted({*found, *identity}) if found.get(name) != identity.get(name)]
    shown = "; ".join(f"{n}: {_short(found.get(n))} there, {_short(identity.get(n))} now"
                      for n in names)  # fmt: skip
    return (
        f"{folder} holds another audit ({shown}). Choose another --output, or add --overwrite to "
        "replace it."
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:18] + "…" + text[-6:]


def _remove_results(folder: Path) -> None:
    for name in WRITTEN:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
