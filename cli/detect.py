"""`unmemorize detect`: scores of prompts, and verdicts with a calibration."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..audit.common.wording import near_ones
from ..shared.score.config import CLIP_PARTS
from ..shared.wording import counted
from .common.options import (
    CALIBRATION,
    AnswerOptions,
    CalibrationFile,
    Collapse,
    DetectionOptions,
    Fast,
    Force,
    ModelOptions,
    Prompts,
    Texts,
    check_calibration,
    takes_options,
)
from .common.terminal import (
    FOUND,
    NOTHING_FOUND,
    Table,
    answering,
    bar,
    print_json,
    print_table,
    shortened,
)

NO_VERDICTS = (
    "No verdicts, and no telling what is high: a threshold comes from ordinary prompts on this "
    "very model and these settings. Type: {}, then this command again with --calibration {}"
)
OF_THE_DEMO = (
    "No prompts were named: these are all captions that an audit of the bundled model looks at. "
    "Type: unmemorize detect {} --prompt TEXT, or --prompts FILE, for your own."
)


@dataclass(frozen=True, kw_only=True)
class DetectOptions(AnswerOptions, ModelOptions, DetectionOptions):
    """Of `unmemorize detect`."""

    prompts: Prompts = None
    prompt: Texts = None
    calibration: CalibrationFile = None
    force: Force = False
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also write JSON lines there; then an interrupted run continues."),
    ] = None
    fast: Fast = False
    collapse: Collapse = False


@takes_options
def detect(options: DetectOptions) -> None:
    """Score prompts. A verdict needs --calibration; without one there are only numbers."""
    check_calibration(options)
    with answering(options, resumes=options.output is not None):
        from ..audit.model.parts import score_prompts

        rows = score_prompts(
            options.subject, files=options.prompts or (), texts=options.prompt or (),
            config=options.detection, calibration=options.calibration, force=options.force,
            sequential=options.fast, collapse=options.collapse, output=options.output, bars=bar,
        )  # fmt: skip
    if options.as_json:
        print_json({"schema_version": 2, "results": rows})
    else:
        print_table(*_table(rows, judged=options.calibration is not None))
        if options.calibration is not None:
            typer.echo(_verdict(rows))
            if caveat := rows[0]["caveat"]:
                typer.echo(f"Caveat: {caveat}")
    if options.calibration is None:
        typer.echo(NO_VERDICTS.format(_calibrate_line(options), CALIBRATION), err=True)
    if not (options.prompts or options.prompt):
        typer.echo(OF_THE_DEMO.format(options.model), err=True)
    found = any(row["memorized"] or any(_clip_hits(row)) for row in rows)
    raise typer.Exit(FOUND if found else NOTHING_FOUND)


def _calibrate_line(options: DetectOptions) -> str:
    """Return what to type for a calibration that fits these options."""
    words = ["unmemorize", "calibrate"]
    for kind in (ModelOptions, DetectionOptions):
        for field in fields(kind):
            value = getattr(options, field.name)
            if field.name == "model":
                words.append(str(value))
            elif value != field.default:
                words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _table(rows: Sequence[Mapping[str, Any]], *, judged: bool) -> Table:
    sampled = any(row["collapse"] is not None for row in rows)
    clips = rows[0]["clip"] is not None
    columns = [
        "score",
        *["magnitude", *["collapse"] * sampled, "p", "memorized"] * judged,
        *[column for name in CLIP_PARTS for column in (name, *["p"] * judged)] * clips,
        "prompt",
    ]
    measure = (
        "Residual outside of the controls (1: ordinary)" if rows[0]["measure"] == "residual"
        else "Magnitude (L2, latent units)"
    )  # fmt: skip
    title = f"{measure}, highest first"
    if any(row["near"] for row in rows):
        title += ", near ones under the memorized one"

    def place(index: int) -> tuple[float, int, bool, float]:
        near = rows[index]["near"]
        member = near["index"] if near else index
        return -rows[member]["score"], member, bool(near), -rows[index]["score"]

    return title, columns, [
        [f"{r['score']:.4g}",
         *[f"{r['magnitude']:.4g}", *[_cell(r["collapse"])] * sampled, _cell(r["p_value"]),
           "near" if r["near"] else _cell(r["memorized"])] * judged,
         *[cell for name in CLIP_PARTS if clips
           for cell in (f"{r['clip'][name]['magnitude']:.4g}",
                        *[_cell(r["clip"][name]["p_value"])] * judged)],
         shortened(r["prompt"])]
        for r in map(rows.__getitem__, sorted(range(len(rows)), key=place))
    ]  # fmt: skip


def _verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how many prompts are flagged, and how many of them are near a memorized one."""
    hits, near = (sum(map(bool, (r[key] for r in rows))) for key in ("memorized", "near"))
    are = "is" if 1 in (hits, len(rows)) else "are"
    prompts = counted(len(rows), "prompt", "prompts")
    said = f"{hits} of {prompts} {are} above the threshold{near_ones(near, hits)}."
    if rows[0]["clip"] is None or rows[0]["clip"]["motion"]["memorized"] is None:
        return said
    content, motion = (sum(flags) for flags in zip(*map(_clip_hits, rows), strict=True))
    return (
        f"{said}\nBy thresholds of their own: content of {content}, motion of {motion}. "
        "Content is what all frames share, motion is the rest."
    )


def _clip_hits(row: Mapping[str, Any]) -> list[bool]:
    """Return whether content and motion are above their thresholds; nothing of images."""
    return [bool(row["clip"][name]["memorized"]) for name in CLIP_PARTS if row["clip"]]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.3g}"
