"""Files that are written whole or not at all, journals that survive a kill, and the cache."""

import errno
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .schema import Reader, conform

CACHE = "UNMEMORIZE_CACHE"
"""Environment variable that names another cache folder."""
LONGEST = 255
"""Bytes of a file name."""
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
REMEDIES = {
    **dict.fromkeys(
        FULL, "What was finished before is kept: free some space and run the same command again, "
        "or choose another folder.",
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "Choose a folder that is yours, or change its permissions.",
    ),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "A file stands where a folder is needed, or "
        "the other way round: choose another place.",
    ),
}  # fmt: skip


class StorageError(OSError):
    """A file could not be written; the message says why and what to do."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full or forbidden disk into a `StorageError` that names `path` and the remedy."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        fault = "No space left to write {}" if error.errno in FULL else "{} cannot be written"
        raise StorageError(
            f"{fault.format(path)} ({error.strerror}). {REMEDIES[error.errno]}"
        ) from error


def beside(path: Path, end: str) -> Path:
    """Return a hidden file next to another: its name and an end, in the bytes that a name may have.

    Most file systems take 255 bytes; a name in Chinese or Japanese has three a letter.
    """
    name = path.name
    if len(os.fsencode(name)) + len(end) + 1 > LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return path.with_name(f".{name}{end}")


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a sibling to write to; it replaces `path` only when the block succeeds.

    Raises:
        StorageError: No space, no permission, or a file where a folder is needed.
    """
    part = beside(path, f".{os.getpid()}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            # An error here would hide the reason why the block failed.
            if part.parent.is_dir():
                part.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Return where is kept what can be made again: `CACHE`, or the platform's place for caches."""
    if named := os.environ.get(CACHE):
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "unmemorize")


def make_folder(path: Path) -> None:
    """Make a folder with its parents and see that files can be written into it.

    Raises:
        StorageError: It cannot be made or written, for whatever reason.
    """
    trial = path / f".{os.getpid()}.part"
    try:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            trial.write_bytes(b"")
            trial.unlink()
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror}). Choose another folder."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with replace_atomically(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of a journal."""

    key: str
    value: Any
    crc: int | None = None
    """Of both; absent in lines of earlier versions."""


PLAIN = Reader(ValueError, "an entry", "")


def _crc(key: str, value: Any) -> int:
    return zlib.crc32(json.dumps([key, value], sort_keys=True, allow_nan=False).encode())


class Entries:
    """Results by key in an append-only file, none of which stays in memory.

    One line of JSON a result. A last line that was torn by a kill or a full disk is cut off when
    the file is opened, so the next one starts clean.
    """

    def __init__(self, path: Path, take: Callable[[str, Any], None] | None = None):
        """Open a file and read what it holds, one line at a time.

        Args:
            path: Made when the first result comes.
            take: Called with each key and value, in the order in which they were written.

        Raises:
            StorageError: The file cannot be read, or a line is no entry.
        """
        self.path, self._size = path, 0
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        with writing(path):
            lines = path.open("rb")
        with lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break  # torn
                entry = self._entry(number, line)
                if take is not None:
                    take(entry.key, entry.value)
                self._size += len(line)
        if self._size < path.stat().st_size:
            with writing(path):
                os.truncate(path, self._size)

    def _entry(self, number: int, line: bytes) -> Entry:
        try:
            entry = conform(PLAIN.parse(line, "it"), Entry)
            if entry.crc not in (None, _crc(entry.key, entry.value)):
                raise ValueError("its crc is another than it was")
        except ValueError as error:
            raise StorageError(
                f"Line {number} of {self.path} is not a journal entry: it was changed by "
                f"something else ({error}). Delete the file to compute its results again."
            ) from error
        return entry

    def put_all(self, values: Mapping[str, Any]) -> None:
        """Store results that belong together with a single write.

        Raises:
            StorageError: The disk is full or the file cannot be written; nothing of `values` stays.
        """
        plain = json.loads(json.dumps(dict(values), allow_nan=False))
        lines = b"".join(
            json.dumps({"key": key, "value": value, "crc": _crc(key, value)}).encode() + b"\n"
            for key, value in plain.items()
        )
        if not self.path.parent.is_dir():
            raise StorageError(
                f"{self.path.parent} was deleted or moved while this ran. Put it back, or run the "
                "same command again to begin anew."
            )
        with writing(self.path):
            # Unbuffered: a buffer could write half of a line now and the rest at exit.
            with self.path.open("ab", buffering=0) as file:
                try:
                    left = lines
                    while left:  # the system takes a part only when the disk is about to be full
                        left = left[os.write(file.fileno(), left) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(self._size)
                    raise
        self._size += len(lines)


class Journal(Entries):
    """The same with its results at hand; killed while writing, it keeps every finished one."""

    def __init__(self, path: Path):
        self._values: dict[str, Any] = {}
        super().__init__(path, self._values.__setitem__)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value stored under `key`."""
        return self._values.get(key, default)

    def values(self) -> list[Any]:
        """Return what is stored, in the order in which the keys first came."""
        return list(self._values.values())

    def put(self, key: str, value: Any) -> None:
        """Store one result durably before returning."""
        self.put_all({key: value})

    def put_all(self, values: Mapping[str, Any]) -> None:
        """Store results that belong together with a single write; see `Entries.put_all`."""
        super().put_all(values)
        self._values.update(json.loads(json.dumps(dict(values))))


@contextmanager
def locked(path: Path, *, owner: str) -> Iterator[None]:
    """Hold `path` as a lock that ends with the process, however it ends.

    Args:
        path: Lock file, made when missing.
        owner: What the lock protects, for the message.

    Raises:
        StorageError: Another process holds it.
    """
    import filelock

    lock = filelock.FileLock(path, timeout=0)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise StorageError(
                f"Another process is writing {owner}. Wait until it has finished, or choose "
                "another output folder."
            ) from error
    try:
        yield
    finally:
        lock.release()
