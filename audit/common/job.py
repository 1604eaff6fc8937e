"""The output folder of an audit: whose it is, what it already holds, and where the job stands."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from ...shared.files.schema import Reader
from ...shared.files.storage import Journal, StorageError, locked, make_folder, write_text
from ...shared.wording import counted

PAGES = ("report.html", "mitigation.html")
IDENTITY, JOURNAL = "job.json", "journal"
LOCK = ".lock"
WRITTEN = (
    "report.html", "mitigation.html", "results.jsonl", "summary.json", "calibration.json",
    "calibration.safetensors", "audit.json", "model_card.md", "badge.svg", "similarity.npz",
    "shown.txt", "images", "sheets", JOURNAL,
)  # fmt: skip
"""All that an audit or a mitigation writes; the journal goes last, so that a killed removal can be
repeated."""


class FolderTaken(ValueError):
    """The output folder holds something other than this very job."""


class StrangeJob(ValueError):
    """The file that names a folder's job holds something else."""


READER = Reader(StrangeJob, "the name of a job", "Choose another --output.")


class Job:
    """An opened output folder; its journals hold every finished part of the work."""

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        self.key = key
        """Stands for all that decides the results, in the keys of the journals."""
        self._journals: dict[str, Journal] = {}

    def journal(self, name: str) -> Journal:
        """Return the journal of one phase, read once."""
        if name not in self._journals:
            self._journals[name] = Journal(self.folder / JOURNAL / f"{name}.jsonl")
        return self._journals[name]


def content_key(*parts: Any) -> str:
    """Return the sha256 of values as JSON: equal content, equal key."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def open_job(
    folder: Path,
    identity: Mapping[str, Any],
    *,
    overwrite: bool,
    check: Callable[[], object] | None = None,
) -> Iterator[Job]:
    """Claim `folder` for one job; the same job continues, another one is refused.

    Args:
        folder: Made when it is missing.
        identity: All that decides the results, as JSON values by readable names.
        overwrite: Remove the files of another job; the same job continues all the same.
        check: Called before a new job claims the folder; when it raises, no new folder stays, so
            that the command with a corrected option finds none that names another job.

    Raises:
        FolderTaken: It holds another job, whose differing settings are named, or foreign files.
        StorageError: It is a file, another process is writing there, or nothing can be written.
    """
    path = folder / JOURNAL / IDENTITY
    identity = dict(json.loads(json.dumps(dict(identity))))
    stored = _read_identity(path)
    try:
        make_folder(folder)
    except StorageError as error:
        if stored == identity and (pages := [p for p in PAGES if (folder / p).is_file()]):
            raise StorageError(
                f"{error} It holds this very work already: {folder / pages[0]}. Copy the folder to "
                "where it can be written to go on or to write it anew."
            ) from error
        raise
    if not overwrite:
        _refuse_another(folder, stored, identity)
        if stored is None:
            _refuse_foreign(folder)
    if check is not None and stored != identity:
        try:
            check()
        except BaseException:
            with suppress(OSError):  # not empty
                folder.rmdir()
            raise
    make_folder(folder / JOURNAL)
    with locked(folder / LOCK, owner=str(folder)):
        stored = _read_identity(path)
        if not overwrite:  # another process may have come first
            _refuse_another(folder, stored, identity)
        for part in folder.rglob(".*.part"):  # of processes that were killed
            part.unlink(missing_ok=True)
        if stored not in (None, identity):
            _remove_results(folder)
        if stored != identity:
            write_text(path, json.dumps(identity, indent=1) + "\n")
        yield Job(folder, content_key(identity))


def _read_identity(path: Path) -> dict[str, Any] | None:
    try:
        return READER.read(path, dict[str, Any])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except StrangeJob:
        return {"job": f"{path.name} is damaged"}


def _refuse_another(folder: Path, stored: dict[str, Any] | None, identity: dict[str, Any]) -> None:
    if stored in (None, identity):
        return
    names = [n for n in sorted({*stored, *identity}) if stored.get(n) != identity.get(n)]
    shown = "; ".join(f"{n}: {_short(stored.get(n))} there, {_short(identity.get(n))} now"
                      for n in names)  # fmt: skip
    raise FolderTaken(
        f"{folder} holds another audit ({shown}). Choose another --output, or add --overwrite to "
        "replace it."
    )


def _refuse_foreign(folder: Path) -> None:
    # A kill right after the start leaves a journal folder that does not name its job yet.
    names = {path.name for path in folder.iterdir() if path.suffix != ".part"}
    if foreign := sorted(names - {JOURNAL, LOCK}):
        raise FolderTaken(
            f"{folder} exists and holds {counted(len(foreign), 'file that is', 'files that are')} "
            f"not an audit's, such as {foreign[0]!r}. Choose another --output, or add "
            "--overwrite to write into it (only files of an audit's own names are replaced)."
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
