"""`unmemorize doctor`: what is installed, which device there is, and what is missing."""

import os
import platform
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from ..shared.dependencies import EXTRAS, SSCD_PACKAGE, has, install_line, sscd_line
from .common.options import AnswerOptions, ModelOptions, takes_options
from .common.terminal import FAILED, answering, print_json, print_table

DISTRIBUTIONS = {"PIL": "pillow", "faiss": "faiss-cpu"}
BASE = ("torch", "safetensors", "numpy", "tqdm", "typer")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(AnswerOptions, ModelOptions):
    """Of `unmemorize doctor`."""

    model: Annotated[
        str,
        typer.Option(help="Also run this model once, and say how much memory it takes; the other "
                     "options of a model belong to it."),
    ] = ""  # fmt: skip


@takes_options
def doctor(options: DoctorOptions) -> None:
    """Say what is installed, which device there is, what is missing and what to type."""
    given = [
        field.name
        for field in fields(ModelOptions)
        if field.name != "model" and getattr(options, field.name) != field.default
    ]
    if given and not options.model:
        raise typer.BadParameter(f"--{given[0].replace('_', '-')} needs --model.")
    with answering(options):
        state = examine()
        if options.model:
            state["memory"] = _memory(options)
    if options.as_json:
        print_json(state)
    else:
        for title in ("machine", "packages"):
            print_table(title.capitalize(), ["what", "found"], list(state[title].items()))
        if options.model:
            subject = options.subject
            title = f"Peak memory of {subject.name} in {subject.dtype} on {subject.device}"
            rows = [[name, _gib(size)] for name, size in state["memory"].items()]
            print_table(title, ["while", "most"], rows)
        for missing in state["missing"]:
            typer.echo(f"Missing for {missing['purpose']}:\n    {missing['type']}")
    raise typer.Exit(0 if state["can_audit"] else FAILED)


def examine() -> dict[str, Any]:
    """Return machine, packages, what is missing with what to type, and whether an audit can run."""
    packages = {name: _version(name) for name in BASE}
    missing, lacking = [], set()
    for extra, (purpose, modules) in EXTRAS.items():
        for module in modules:
            name = DISTRIBUTIONS.get(module, module)
            packages[name] = _version(name) if has(module) else "missing"
        if absent := [m for m in modules if not has(m)]:
            lacking.add(extra)
            names = ", ".join(DISTRIBUTIONS.get(m, m) for m in absent)
            missing.append({"purpose": f"{purpose} ({names})", "type": install_line(extra)})
    packages[SSCD_PACKAGE] = _version(SSCD_PACKAGE)
    if packages[SSCD_PACKAGE] == "missing":
        purpose, _ = EXTRAS["sscd"]
        missing.append({"purpose": f"{purpose} ({SSCD_PACKAGE})", "type": sscd_line()})
    return {
        "machine": _machine(),
        "packages": packages,
        "missing": missing,
        "can_audit": not lacking & {"models", "reports"},
    }


def _memory(options: DoctorOptions) -> dict[str, int]:
    from ..shared.models.memory import peaks_of_use

    subject = options.subject
    return peaks_of_use(lambda: subject.denoiser, subject.device)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "missing"


def _machine() -> dict[str, str]:
    import torch

    from ..shared.models.checks import available_memory

    free = available_memory("cpu")
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor cores": str(os.cpu_count()),
        "memory": "unknown" if free is None else f"{_gib(free)} free",
    }
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found[f"cuda:{index}"] = f"{name}, {_gib(free)} of {_gib(total)} free"
    found["default device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
