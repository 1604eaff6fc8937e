"""What the commands print: tables, verdicts, one JSON document."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...shared.wording import counted, visible
from ..common.result import finite
from .result import AuditResult

SHOWN = 20
LONGEST = 300
"""Characters of a prompt."""
Table = tuple[str, list[str], list[list[str]]]
"""Title, columns and rows."""


def audit_document(result: AuditResult) -> dict[str, Any]:
    """Return the one JSON document of ``audit --json``: the summary, the flagged, the files."""
    return finite({
        **result.summary,
        "output": str(result.folder),
        "files": {name: str(result.folder / name) for name in
                  ("report.html", "results.jsonl", "summary.json", "calibration.json")},
        "flagged": [asdict(entry) for entry in result.flagged],
    })  # fmt: skip


def audit_table(result: AuditResult) -> Table:
    """Return the highest flagged prompts."""
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


def scores_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return what `detect` found, highest score first."""
    columns = ["score", "per element", "p", "memorized", "prompt"]
    return "Text-conditional magnitude (L2, latent units), highest first", columns, [
        [f"{r['score']:.4g}", f"{r['score_per_element']:.4g}", _cell(r["p_value"]),
         _cell(r["memorized"]), r["prompt"][:LONGEST]]
        for r in sorted(rows, key=lambda r: -r["score"])
    ]  # fmt: skip


def words_table(row: Mapping[str, Any]) -> Table:
    """Return what `explain` found about one prompt, most significant word first."""
    pairs = sorted(zip(row["words"], row["significance"], strict=True), key=lambda p: -p[1])
    left_out = {occlusion["word"]: occlusion for occlusion in row["occlusions"]}
    return row["prompt"][:LONGEST], ["word", "significance", "score without it"], [
        [word, f"{value:.4g}", f"{left_out[word]['score_after']:.4g} (of "
         f"{left_out[word]['score_before']:.4g})" if word in left_out else ""]
        for word, value in pairs
    ]  # fmt: skip


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.3g}"
