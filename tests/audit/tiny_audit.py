"""What the small audit of the tests is asked, and how what it wrote is read back."""

import json
from pathlib import Path
from typing import Any

from unmemorize import audit

MARKUP = "<script>alert(1)</script> [red]x[/red] \x07\u202e قطة 猫"
LONG = " ".join(["word"] * 10_000)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of results.jsonl."""
    # Split at newlines alone: a prompt may hold other separators.
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().split(b"\n")[:-1]]


def schema(name: str) -> dict[str, Any]:
    """Return the shipped schema of summary.json or of a line of results.jsonl."""
    path = Path(audit.__file__).parent / "model" / f"{name}.schema.json"
    return json.loads(path.read_text("utf-8"))
