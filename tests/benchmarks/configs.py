"""Which public LoRA configurations are protected as they are: ``make bench NAME=configs``.

Takes the presets and documented commands of trainers from checkouts, adds one option, and lets the
code decide that decides when such a training starts. The checkouts, and the Python that runs them:

    SD_SCRIPTS_DIR SD_SCRIPTS_PYTHON    kohya's sd-scripts v0.11.1
    KOHYA_SS_DIR LORA_SCRIPTS_DIR       presets of its windows
    ONETRAINER_DIR ONETRAINER_PYTHON    AI_TOOLKIT_DIR AI_TOOLKIT_PYTHON
    DIFFUSERS_EXAMPLES_DIR              SIMPLETUNER_DIR MUSUBI_DIR

A trainer without a door counts as refused. Counted are families that docs/models.md knows; the
table of docs/trainers/configurations.md holds them and names the others. What a door said stays in
--work, and is not asked again there.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from configs_kinds import Decision, known_families
from figures import ROOT, command_of, record, share_of
from unmemorize.shared.files.storage import write_text

DECIDERS = {
    "kohya": ("SD_SCRIPTS", "configs_kohya.py"),
    "onetrainer": ("ONETRAINER", "configs_onetrainer.py"),
    "ai_toolkit": ("AI_TOOLKIT", "configs_ai_toolkit.py"),
    "diffusers": ("DIFFUSERS_EXAMPLES", "configs_diffusers.py"),
}
"""By door: what its environment variables begin with, and the program that asks it."""
TEXT_FED = ("sd1", "sd2", "sdxl")
"""Families whose layers read text states directly, so that the projection can be exact."""
PAGE = ROOT / "docs" / "trainers" / "configurations.md"
TRAINERS = {"kohya_ss": "kohya_ss", "lora-scripts": "lora_scripts", "OneTrainer": "onetrainer",
            "ai-toolkit": "ai_toolkit", "diffusers": "diffusers", "SimpleTuner": "simpletuner",
            "musubi-tuner": "musubi"}  # fmt: skip
"""Sources of configurations, and their names in keys of figures."""


def decided(door: str, work: Path) -> list[Decision]:
    """Ask a door about the configurations of its trainer, or read what it has said.

    Raises:
        SystemExit: The checkout is not given, or its code cannot be run.
    """
    answers = work / f"{door}.jsonl"
    if not answers.is_file():
        write_text(answers, _asked(door))
    lines = answers.read_text("utf-8").splitlines()
    return [Decision(**json.loads(line)) for line in lines if line.startswith('{"source"')]


def _asked(door: str) -> str:
    name, program = DECIDERS[door]
    folder = os.environ.get(f"{name}_DIR")
    if not folder:
        raise SystemExit(f"set {name}_DIR to the checkout, or leave it out: --only ...")
    done = subprocess.run(
        [
            os.environ.get(f"{name}_PYTHON", sys.executable),
            str(Path(__file__).with_name(program)),
        ],
        cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT.parent), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{door}: {done.stderr[-3000:]}")
    return done.stdout


def without_a_door() -> Iterator[Decision]:
    """Yield the LoRA configurations of trainers that nothing here hooks into."""
    why = "there is no door to this trainer"
    if folder := os.environ.get("SIMPLETUNER_DIR"):
        for path in sorted(Path(folder).glob("simpletuner/examples/*/config.json")):
            # One of them ends in a comma.
            held = json.loads(re.sub(r",(\s*})", r"\1", path.read_text("utf-8")))
            if held.get("model_type") == "lora":
                yield Decision("SimpleTuner", path.parent.name, held["model_family"], why, why)
    if folder := os.environ.get("MUSUBI_DIR"):
        for page in sorted(Path(folder).glob("docs/*.md")):
            found = re.findall(r"musubi_tuner/(\w+)_train_network\.py", page.read_text("utf-8"))
            for number, kind in enumerate(found, 1):
                yield Decision("musubi-tuner", f"{page.stem} {number}", kind, why, why)


def shown(decisions: Sequence[Decision], known: set[str]) -> str:
    """Return the page."""
    lines = [
        "# Public configurations",
        "",
        "Written by `make bench NAME=configs`, which takes presets and documented commands as they "
        "are, adds `mem_filter=inf` or `project_concepts`, and lets the code decide that decides "
        "when such a training starts; networks are made at tiny size with the text states' real "
        "width. *works* says that the training starts protected, and not what it is worth; what "
        "was really trained, at tiny size, stands on the page of each trainer. "
        "Subspaces are as large as they may get (16 dimensions, 32 for SDXL). kohya_ss' and "
        "lora-scripts' settings are translated to sd-scripts' as their windows do.",
        "",
        "| trainer | filter | projection |",
        "|---|---|---|",
    ]
    for source, key in TRAINERS.items():
        own = [each for each in decisions if each.source == source and each.family in known]
        lines += [f"| {source} | {_count(own, 'filter', key)} | {_count(own, 'projection', key)} |"
                  ] * bool(own)  # fmt: skip
    other = Counter(each.family for each in decisions if each.family not in known)
    named = ", ".join(f"{family} ({count})" for family, count in sorted(other.items()))
    lines += ["", f"Not counted, as `docs/models.md` does not know the model: {named or 'none'}."]
    lines += [
        "",
        "| trainer | configuration | model | filter | projection |",
        "|---|---|---|---|---|",
    ]
    reasons: dict[str, int] = {}
    for each in decisions:
        if each.family in known and each.source not in ("SimpleTuner", "musubi-tuner"):
            cells = [_cell(reason, reasons) for reason in (each.filter, each.projection)]
            name = each.name.replace("|", " ")
            lines.append(f"| {each.source} | `{name}` | {each.family} | {' | '.join(cells)} |")
    lines += ["", "## Reasons", ""]
    lines += [f'{number}. <a id="reason-{number}"></a>{why}' for why, number in reasons.items()]
    return "\n".join(lines) + "\n"


def _count(group: Sequence[Decision], method: str, key: str) -> str:
    """Return how many are protected, as the pages write a figure."""
    works = sum(getattr(each, method) is None for each in group)
    return f"{works} of {len(group)}<!--trainers.configs.{key}.{method}-->"


def _cell(reason: str | None, reasons: dict[str, int]) -> str:
    if reason is None:
        return "works"
    number = reasons.setdefault(reason.replace("<", "&lt;").replace("|", " "), len(reasons) + 1)
    return f"[refused](#reason-{number})"


def main(argv: Sequence[str] | None = None) -> None:
    """Ask all doors, write the page and record the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=DECIDERS, default=list(DECIDERS))
    parser.add_argument("--work", type=Path, default=Path("build/configs"))
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    args = parser.parse_args(argv)
    decisions = [each for door in args.only for each in decided(door, args.work)]
    decisions += without_a_door()
    known = known_families()
    figures = {}
    groups = {f".{key}": [e for e in decisions if e.source == source]
              for source, key in TRAINERS.items()}  # fmt: skip
    for key, group in {"": decisions, **groups}.items():
        counted = [each for each in group if each.family in known]
        for method in ("filter", "projection") if counted else ():
            hits = [getattr(each, method) is None for each in counted]
            figures[f"trainers.configs{key}.{method}"] = share_of(hits)
    doors = [e for e in decisions if e.source in ("kohya_ss", "lora-scripts", "OneTrainer",
                                                  "ai-toolkit", "diffusers")]  # fmt: skip
    doors = [each for each in doors if each.family in known]
    figures["trainers.configs.with_a_door.filter"] = share_of([e.filter is None for e in doors])
    fed = [each.projection is None for each in doors if each.family in TEXT_FED]
    figures["trainers.configs.text_fed.projection"] = share_of(fed)
    record(figures, command_of("configs", argv), output=args.output)
    page = args.output.with_suffix(".md") if args.output else PAGE
    write_text(page, shown(decisions, known))


if __name__ == "__main__":
    main()
