"""The digest that holds a report together, and what it is worth.

It shows that a report is the one that somebody named by its digest, and that its parts belong to
each other. It is no signature: who changes a report can compute a new digest, and only one that was
published elsewhere tells the two apart. Nor does it say that the audit was run honestly.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIGEST = "digest"
"""The field of audit.json that does not count for its own digest."""
_CHUNK = 1 << 20


def digest_of(document: Mapping[str, Any]) -> str:
    """Return the sha256 of a JSON object without its digest, however it is laid out.

    What is hashed is one line of ASCII: keys sorted, no spaces, floats as Python writes them.
    """
    content = {name: value for name, value in document.items() if name != DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def parse(text: str) -> dict[str, Any]:
    """Return the JSON object of a report that may come from anywhere.

    Raises:
        ValueError: It is no JSON object, repeats a key (readers disagree which one counts), holds
            a number that JSON has not, or nests too deeply.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unrepeated, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError(f"it holds {type(document).__name__}, expected an object")
    return document


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
