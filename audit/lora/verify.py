"""Verify: whether the report of a LoRA's audit belongs to given files and was not edited.

A report may come from anybody: nothing in it is believed, run or opened outside of the given
folders. What fitting parts prove, and what they do not, stands in `document`.
"""

import hashlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ...shared.files.prompts import image_files
from ...shared.files.schema import Reader, digest_of
from ...shared.files.weights import file_sha256
from ...shared.wording import counted, name_some
from ..common.job import JOURNAL, LOCK
from ..common.subject import Subject
from .document import CARD, DIGEST, DOCUMENT, NO_DIGEST, SCHEMA_VERSION, TITLE

LARGEST = 1 << 30
"""Bytes of an audit.json that is read."""


class ReportError(ValueError):
    """There is no report, or it cannot be understood; the message says what to do."""


READER = Reader(ReportError, "a report", "Ask its author for the report as it was written.")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison."""

    what: str
    fits: bool
    detail: str

    @classmethod
    def of(cls, what: str, fits: bool, yes: str, no: str) -> "Check":
        """Return a comparison with the sentence for its result."""
        return cls(what=what, fits=fits, detail=yes if fits else no)


def verify_report(
    report: Path,
    *,
    lora: Path | None = None,
    images: Path | None = None,
    held_out: Path | None = None,
    model: str | None = None,
    digest: str | None = None,
) -> tuple[Check, ...]:
    """Return what was compared and whether it fits; what was not given is not compared.

    Args:
        report: Folder of an audit, or its audit.json.
        lora: File that the report should be about; its name does not matter.
        images: Training folder; names matter, since trainers read repeats and captions by them.
        held_out: Folder of held-out images, where they lay apart.
        model: Base model: `demo`, `demo-flow`, folder, file or hub id.
        digest: Published by the report's author elsewhere.

    Raises:
        ReportError: No audit.json there, or one of something else or of a later version.
        ModelError: The base model cannot be read.
        OSError: A given file cannot be read.
    """
    path = report / DOCUMENT if report.is_dir() else report
    text = _read(path)
    try:
        document = parse(text)
        own = digest_of(document, DIGEST)
    except ValueError as error:
        return (Check(what=DOCUMENT, fits=False, detail=f"It was damaged or edited: {error}"),)
    _refuse_strange(document, path)
    checks = [Check.of(
        DOCUMENT, document.get(DIGEST) == own, f"Its digest is {own}.",
        f"It was edited: its content has the digest {own}, and it names another.",
    )]  # fmt: skip
    if digest is not None:
        checks.append(Check.of(
            "published digest", digest.strip().lower() == own, "It is that of this report.",
            "It is that of another report, or this one was edited and sealed anew.",
        ))  # fmt: skip
    files = _mapping(document, "files")
    checks.append(
        _report_files(path.parent, files, str(document.get(DIGEST)), whole=report.is_dir())
    )
    if lora is not None:
        audited = _mapping(document, "inputs", "lora")
        name = audited.get("name")
        then = "" if lora.name == name else f", which was called {name!r} then"
        checks.append(Check.of(
            "LoRA", file_sha256(lora) == audited.get("sha256"), f"It is the audited file{then}.",
            f"The report is about another file, {name!r}.",
        ))  # fmt: skip
    if images is not None:
        checks.append(_folder("training folder", images, _mapping(document, "inputs", "images")))
    if held_out is not None:
        checks.append(_folder("held-out folder", held_out,
                              _mapping(document, "inputs", "held_out")))  # fmt: skip
    if model is not None:
        audited = _mapping(document, "inputs", "base")
        checks.append(Check.of(
            "base model", Subject(model).fingerprint == audited.get("sha256"),
            "It is the audited one.",
            f"The audit was made on other weights, {audited.get('name')!r}.",
        ))  # fmt: skip
    return tuple(checks)


def _read(path: Path) -> str:
    if not path.is_file():
        raise ReportError(f"There is no {path}. Give the folder that `unmemorize audit --lora … "
                          "--images …` wrote, or its audit.json.")  # fmt: skip
    if path.stat().st_size > LARGEST:
        raise ReportError(f"{path} has more than {LARGEST >> 20} MB: no audit writes so much.")
    # What is not UTF-8 was not written by an audit: replaced, it cannot fit its digest.
    return path.read_bytes().decode("utf-8", "replace")


def parse(text: str) -> dict[str, Any]:
    """Return the JSON object of a report that may come from anywhere.

    Raises:
        ReportError: It is no JSON object, or one that readers disagree about; see `Reader.parse`.
    """
    return READER.check(READER.parse(text, DOCUMENT), dict[str, Any], DOCUMENT)


def _refuse_strange(document: Mapping[str, Any], path: Path) -> None:
    """Raise for JSON of another kind or a later version, of which nothing can be said."""
    if document.get("title") != TITLE:
        raise ReportError(f"{path} is no audit of a LoRA: its title is not {TITLE!r}.")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ReportError(f"{path} has schema version {document.get('schema_version')!r}, this "
                          f"program reads {SCHEMA_VERSION}. Install the version of Unmemorize that "
                          "wrote it.")  # fmt: skip


def _mapping(document: Mapping[str, Any], *keys: str) -> dict[str, str]:
    """Return names with their sha256, or whatever texts stand under the keys."""
    value: Any = document
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ReportError(f"audit.json has no usable {'.'.join(keys)}: no audit wrote it so.")
    return value


def _report_files(folder: Path, expected: Mapping[str, str], digest: str, *, whole: bool) -> Check:
    """Compare the files of the report itself; those that were not passed on cannot be compared.

    Of a `whole` folder, files that the report does not know are named.
    """
    absent, changed = _compare(folder, {n: each for n, each in expected.items() if n != CARD})
    if CARD in expected:
        card = folder / CARD
        if not card.is_file():
            absent.append(CARD)
        elif _card_sha256(card, digest) != expected[CARD]:
            changed.append(CARD)
    here = len(expected) - len(absent)
    detail = f"{counted(here, 'file is', 'files are')} as written."
    if changed:
        detail = f"{counted(len(changed), 'file was', 'files were')} edited: {name_some(changed)}."
    if absent:
        are = counted(len(absent), "file is", "files are")
        detail += f" {are} not here and could not be compared: {name_some(absent)}."
    if others := _unknown(folder, {*expected, DOCUMENT, CARD}) if whole else []:
        are = counted(len(others), "file is", "files are")
        detail += f" {are} beside them that the report does not know: {name_some(others)}."
    return Check(what="page, badge, card, images", fits=not changed, detail=detail)


def _card_sha256(card: Path, digest: str) -> str:
    text = card.read_bytes().replace(digest.encode(), NO_DIGEST.encode())
    return hashlib.sha256(text).hexdigest()


def _unknown(folder: Path, known: Set[str]) -> list[str]:
    """Return the files of a folder that its report does not know, less what an audit works with."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [
        name.as_posix() for name in names
        if name.as_posix() not in known and name.parts[0] != JOURNAL and name.name != LOCK
    ]  # fmt: skip


def _folder(what: str, folder: Path, expected: Mapping[str, str]) -> Check:
    """Compare a folder of images and captions with what the audit read there."""
    if not folder.is_dir():
        raise ReportError(f"There is no folder {folder}.")
    absent, changed = _compare(folder, expected)
    images = (path for path in image_files(folder) if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in images)
    others = [name for name in names if name not in expected]
    renamed = _renamed(folder, {name: expected[name] for name in absent}, others)
    missing = [name for name in absent if name not in renamed]
    faults = [
        f"{counted(len(names), 'file', 'files')} {how}: {name_some(names)}."
        for names, how in (
            (changed, "changed"),
            (missing, "missing"),
            ([f"{old} is now {new}" for old, new in renamed.items()], "renamed"),
        )
        if names
    ]
    detail = " ".join(faults) or (
        f"All {counted(len(expected), 'file', 'files')} are those that were audited."
        if expected else "The audit read no such files."
    )  # fmt: skip
    if more := len(others) - len(renamed):
        are = counted(more, "image there is", "images there are")
        detail += f" {are} not part of the audit."
    return Check(what=what, fits=bool(expected) and not faults, detail=detail)


def _compare(folder: Path, expected: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the names of files that are absent, and of those with another content."""
    absent, changed = [], []
    for name, sha256 in expected.items():
        path = folder / name if _stays_inside(name) else None
        if path is None or not path.is_file():
            absent.append(name)
        elif file_sha256(path) != sha256:
            changed.append(name)
    return absent, changed


def _stays_inside(name: str) -> bool:
    """Return whether a name from a report can only mean something below a folder."""
    windows = PureWindowsPath(name)
    rooted = PurePosixPath(name).is_absolute() or windows.drive or windows.root
    return bool(name) and not rooted and ".." not in windows.parts and "\0" not in name


def _renamed(folder: Path, absent: Mapping[str, str], others: list[str]) -> dict[str, str]:
    """Return by old name what the images that are `absent`, with their sha256, are called now."""
    if not absent:
        return {}
    there: dict[str, list[str]] = {}
    for name in others:
        there.setdefault(file_sha256(folder / name), []).append(name)
    return {old: there[sha256].pop() for old, sha256 in absent.items() if there.get(sha256)}
