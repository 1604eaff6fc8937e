"""Draw batches in this process, or spread over several processes by accelerate."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...shared.dependencies import require
from ...shared.files.storage import write_text
from ...shared.wording import counted
from ..common.job import Job
from ..common.measure import Bar, Bars
from .config import LoraAuditConfig
from .drawing import Batch, Subjects, draw, unfinished

SETTINGS = ("model", "revision", "model_config", "resolution", "device", "dtype",
            "generation_steps", "cond_scale")  # fmt: skip
"""What the workers need to know besides their batches."""
GLANCE = 0.5
"""Seconds between two looks at what the workers have finished."""


class DrawingError(RuntimeError):
    """A process that draws has failed; the message holds the end of what it said."""


def draw_all(
    planned: Sequence[Batch], subjects: Subjects, config: LoraAuditConfig, job: Job, bars: Bars
) -> None:
    """Draw what of the plan is missing.

    Raises:
        DrawingError: One of several processes has failed; what was drawn is kept.
    """
    left = unfinished(planned, job.folder)
    total, missing = (sum(len(batch.shots) for batch in part) for part in (planned, left))
    bar = bars("images", total, total - missing, "image")
    try:
        if config.processes > 1 and len(left) > 1:
            _draw_elsewhere(left, config, job, bar)
        else:
            for batch in left:
                draw(subjects.under(batch.lora), batch, job.folder, config)
                bar.update(len(batch.shots))
    finally:
        bar.close()


def to_request(left: Sequence[Batch], config: LoraAuditConfig, folder: Path) -> dict[str, Any]:
    """Return all that a worker must know, as JSON values."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    return {
        "settings": settings | {"model_config": config.model_config and str(config.model_config)},
        "folder": str(folder.resolve()),
        "batches": [{"lora": str(batch.lora.resolve()), "shots": [asdict(s) for s in batch.shots]}
                    for batch in left],
    }  # fmt: skip


def _draw_elsewhere(left: Sequence[Batch], config: LoraAuditConfig, job: Job, bar: Bar) -> None:
    """Start the workers, count their files, and stop them when this process is stopped."""
    require("accelerate", purpose="Drawing with several processes", extra="models")
    request = job.folder / "journal" / "drawing.json"
    write_text(request, json.dumps(to_request(left, config, job.folder)))
    said = request.with_suffix(".log")
    paths = [job.folder / shot.path for batch in left for shot in batch.shots]
    waiting = [path for path in paths if not path.is_file()]
    with said.open("w+b") as log:
        workers = subprocess.Popen(
            _command(config, request), stdout=log, stderr=log, env=_env(config)
        )
        try:
            while workers.poll() is None:
                waiting = _count(waiting, bar)
                _wait(workers)
        finally:
            workers.terminate()
            workers.wait()
    waiting = _count(waiting, bar)
    if workers.returncode or waiting:
        raise DrawingError(
            f"{config.processes} processes were to draw, "
            f"{counted(len(waiting), 'image is', 'images are')} missing: "
            f"{said.read_text('utf-8', 'replace').strip()[-600:]}\nWhat was drawn is kept; "
            "the same command continues, also with --processes 1."
        )
    request.unlink()
    said.unlink()


def _count(waiting: Sequence[Path], bar: Bar) -> list[Path]:
    """Tell the bar what was finished since the last look, and return what was not."""
    left = [path for path in waiting if not path.is_file()]
    if len(left) < len(waiting):
        bar.update(len(waiting) - len(left))
    return left


def _wait(workers: subprocess.Popen) -> None:
    try:
        workers.wait(GLANCE)
    except subprocess.TimeoutExpired:
        return


def _command(config: LoraAuditConfig, request: Path) -> list[str]:
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    kind = "--cpu" if on_cpu else "--multi_gpu"
    return [
        sys.executable, "-m", "accelerate.commands.launch", kind,
        "--num_processes", str(config.processes), "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", f"{__package__}.worker", str(request),
    ]  # fmt: skip


def _env(config: LoraAuditConfig) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // config.processes)
    return {"OMP_NUM_THREADS": str(threads)} | os.environ
