"""What the command prints about a finished audit."""

from dataclasses import asdict
from typing import Any

from ..shared.pictures import visible
from .result import AuditResult, finite
from .wording import counted

SHOWN = 20


def audit_document(result: AuditResult) -> dict[str, Any]:
    """Return the one JSON document of ``audit --json``: the summary, the flagged, the files."""
    return finite({
        **result.summary,
        "output": str(result.folder),
        "files": {name: str(result.folder / name) for name in
                  ("report.html", "results.jsonl", "summary.json", "calibration.json")},
        "flagged": [asdict(entry) for entry in result.flagged],
    })  # fmt: skip


def audit_table(result: AuditResult) -> tuple[str, list[str], list[list[str]]]:
    """Return title, columns and rows of the highest flagged prompts."""
    rows = []
    for entry in result.flagged[:SHOWN]:
        known = entry.explanation
        pairs = zip(known.words, known.significance, strict=True) if known else ()
        words = sorted(pairs, key=lambda pair: -pair[1])[:2]
        rows.append([
            f"{entry.score:.4g}", f"{entry.p_value:.2g}", entry.group or "-", entry.prompt[:200],
            ", ".join(word.strip(",.;:") or word for word, _ in words),
        ])  # fmt: skip
    left = len(result.flagged) - len(rows)
    title = "Memorized prompts, highest score first" + (f" ({left} more in the report)" if left > 0
                                                        else "")  # fmt: skip
    return title, ["score", "p", "group", "prompt", "by the words"], rows


def audit_verdict(result: AuditResult) -> str:
    """Return the closing sentences: counts, certainty, caveats, where to look."""
    summary, share = result.summary, result.summary["flagged_rate"]
    calibration = summary["calibration"]
    are = "is" if 1 in (share["hits"], share["n"]) else "are"
    lines = [
        f"{share['hits']} of {counted(share['n'], 'prompt', 'prompts')} {are} above the threshold "
        f"{calibration['threshold']:.4g} ({share['rate']:.1%}, 95 % interval {share['low']:.1%} to "
        f"{share['high']:.1%}); {summary['expected_by_chance']:.1f} are expected there by chance, "
        f"so many or more with probability {summary['chance_p_value']:.2g}."
    ]
    lines += [f"{name}: {group['hits']} of {group['n']}" for name, group in
              summary["groups"].items()]  # fmt: skip
    similarity = summary["similarity"]
    if similarity and similarity["copies"]:
        copies = similarity["copies"]
        images = counted(copies["n"], "image", "images")
        them = "it" if share["hits"] == 1 else "them"
        are = "is a copy" if 1 in (copies["hits"], copies["n"]) else "are copies"
        lines.append(
            f"{copies['hits']} of {images} generated for {them} {are} of a training image."
        )
    lines += [f"Caveat: {caveat}" for caveat in summary["caveats"]]
    lines.append(f"Report: {result.folder / 'report.html'}")
    return "\n".join(map(visible, lines))
