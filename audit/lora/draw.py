"""Draw: have the model make every image and score every prompt, in one process or in several.

A batch is drawn by one process alone and holds the same images whoever draws it, so that the number
of processes changes nothing. Nothing is sent between them: an image that lies there is finished.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ...shared.dependencies import require
from ...shared.files.images import read_frames, read_image, save_clip
from ...shared.files.storage import write_text
from ...shared.wording import counted
from ..common.measure import Bar, Bars
from ..common.subject import Subject
from .ask import Plan, Question, Shot
from .attack import as_clips, sample_attack
from .clips import MOST
from .config import LoraAuditConfig
from .result import PromptScore, TrainingSet
from .work import Work

Batch = tuple[Shot, ...]
"""Images of one mode that are sampled at once, so that their digits depend on nothing else."""
SETTINGS = (
    "model", "strength", "revision", "model_config", "resolution", "frames", "device", "dtype",
    "offload", "quantize", "generation_steps", "cond_scale",
)  # fmt: skip
"""What the workers need to know besides their batches."""
PATIENCE = 5.0
"""Seconds that workers have to end."""
GLANCE = 0.5
"""Seconds between two looks at what the workers have finished."""
AT_ONCE = 4
"""Images in one pass through the autoencoder."""


class DrawingError(RuntimeError):
    """A process that draws has failed; the message holds the end of its output."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What the model made; the images lie in the output folder, where the plan says."""

    scores: tuple[PromptScore, ...]
    """Of the plan's questions."""
    round_trips: tuple[Path, ...]
    """The training images as the autoencoder gives them back."""
    rises: tuple[float, ...]
    """Per saved epoch, the mean LoRA-on minus LoRA-off score of the captions."""


def draw(plan: Plan, work: Work) -> Drawn:
    """Draw what is missing of the plan, stage after stage, one model after the other.

    Raises:
        DrawingError: One of several processes has failed; what was drawn is kept.
    """
    config, folder = work.config, work.job.folder
    scores = score_questions(plan.questions, work)
    trips = draw_round_trips(plan.training, work)
    for _, shots in groupby(plan.shots, key=lambda shot: shot.stage):
        planned = batches([*shots], config.batch_size)
        draw_all(planned, work.subject, config, folder, work.bars)
    # Every epoch has the same captions, and the base model's score of each is measured once.
    captions = list(dict.fromkeys(shot.prompt for _, s in plan.epochs[:1] for shot in s))
    base = work.scores(captions, work.subject, lora=False) if captions else {}
    rises = []
    for epoch, shots in plan.epochs:
        saved = replace(config, lora=epoch.path)
        subject = Subject.of(saved)
        draw_all(batches(shots, config.batch_size), subject, saved, folder, work.bars)
        with_lora = work.scores(captions, subject, lora=True)
        rises.append(sum(with_lora[c] - base[c] for c in captions) / len(captions))
    return Drawn(scores=scores, round_trips=trips, rises=tuple(rises))


def score_questions(asked: Sequence[Question], work: Work) -> tuple[PromptScore, ...]:
    """Return the mean |D| of every distinct prompt, with the LoRA and without."""
    first = {question.prompt: question for question in reversed(asked)}
    prompts = list(dict.fromkeys(question.prompt for question in asked))
    on, off = (work.scores(prompts, work.subject, lora=lora) for lora in (True, False))
    return tuple(
        PromptScore(prompt=prompt, asked=first[prompt].asked, source=first[prompt].source,
                    on=on[prompt], off=off[prompt])
        for prompt in prompts
    )  # fmt: skip


def has_round_trips(training: TrainingSet, work: Work) -> bool:
    """Return whether all round trips through the autoencoder are there."""
    return all(trip.is_file() for trip in _round_trips(training, work))


def _round_trips(training: TrainingSet, work: Work) -> tuple[Path, ...]:
    folder = work.job.folder / "journal" / "round_trips"
    return tuple(folder / f"{place:06d}.png" for place in range(len(training.images)))


def draw_round_trips(training: TrainingSet, work: Work) -> tuple[Path, ...]:
    """Write what the autoencoder makes of each image, in the size the network draws."""
    paths = [training.path_of(image) for image in training.images]
    trips = _round_trips(training, work)
    left = [place for place, trip in enumerate(trips) if not trip.is_file()]
    with closing(work.bars("autoencoder", len(trips), len(trips) - len(left), "image")) as bar:
        most = MOST if work.subject.video else 1  # an image model is trained on the first frame
        for start in range(0, len(left), AT_ONCE):
            places, denoiser = left[start : start + AT_ONCE], work.subject.denoiser
            clips = [read_frames(paths[n], most) if most > 1 else [read_image(paths[n])]
                     for n in places]  # fmt: skip
            # Frames go by themselves: a clip as a whole has to be of a length that its model takes.
            latents = denoiser.encode_images([frame for clip in clips for frame in clip])
            frames = iter(as_clips(denoiser.decode(latents)))
            for place, clip in zip(places, clips, strict=True):
                save_clip([next(frames)[0] for _ in clip], trips[place])
            bar.update(len(places))
    return trips


def batches(shots: Sequence[Shot], size: int) -> list[Batch]:
    """Cut shots into batches of one mode; the cuts do not depend on what is finished."""
    return [
        tuple(same[start : start + size])
        for _, group in groupby(shots, key=lambda shot: shot.mode)
        for same in [list(group)]
        for start in range(0, len(same), size)
    ]


def unfinished(planned: Sequence[Batch], folder: Path) -> list[Batch]:
    """Return the batches of which a file is missing."""
    return [batch for batch in planned
            if not all((folder / shot.path).is_file() for shot in batch)]  # fmt: skip


@torch.no_grad()  # a model that is loaded in inference mode could never be switched again
def estimate(
    planned: Sequence[Batch], subject: Subject, folder: Path, config: LoraAuditConfig
) -> str:
    """Return a sentence with the time that the missing images will take, by one timed step."""
    left = sum(map(len, unfinished(planned, folder)))
    if not left:
        return "All images are there."
    denoiser, rows = subject.denoiser, 2 * config.batch_size
    sigma = denoiser.sigmas(config.generation_steps)[0]
    noise = denoiser.initial_noise([0] * rows, sigma)
    empty = denoiser.unconditional()[[0] * rows]
    for _ in range(2):  # the first call also warms up
        start = time.perf_counter()
        denoiser.denoise(noise, sigma, empty).cpu()
        step = time.perf_counter() - start
    # Processes on one processor share its cores.
    cores = (os.cpu_count() or 1) // torch.get_num_threads()
    at_once = min(config.processes, max(1, cores)) if _on_cpu(config) else config.processes
    seconds = step * config.generation_steps * left / config.batch_size / at_once
    minutes = seconds / 60
    if seconds < 90:
        about = counted(max(1, round(seconds)), "second", "seconds")
    else:
        about = f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
    return f"{counted(left, 'image is', 'images are')} to be drawn: about {about}."


def draw_all(
    planned: Sequence[Batch], subject: Subject, config: LoraAuditConfig, folder: Path, bars: Bars
) -> None:
    """Draw the batches that are missing in `folder`.

    Raises:
        DrawingError: One of several processes has failed; what was drawn is kept.
    """
    left = unfinished(planned, folder)
    total, missing = (sum(map(len, part)) for part in (planned, left))
    with closing(bars("images", total, total - missing, "image")) as bar:
        if config.processes > 1 and len(left) > 1:
            _draw_elsewhere(left, config, folder, bar)
        else:
            for batch in left:
                draw_batch(batch, subject, config, folder)
                bar.update(len(batch))


def draw_batch(batch: Batch, subject: Subject, config: LoraAuditConfig, folder: Path) -> None:
    """Sample a batch and write its images into `folder`, each whole or not at all."""
    denoiser, mode = subject.denoiser, batch[0].mode
    prompts, seeds = [shot.prompt for shot in batch], [shot.seed for shot in batch]
    if mode == "attack":
        clips = sample_attack(denoiser, prompts, seeds, config.generation_steps)
    else:
        with denoiser.lora_disabled() if mode == "off" else nullcontext():
            how = {"steps": config.generation_steps, "cond_scale": config.cond_scale}
            clips = (
                denoiser.generate_clips(prompts, seeds, **how) if denoiser.family.video
                else [[image] for image in denoiser.generate(prompts, seeds, **how)]
            )  # fmt: skip
    for shot, frames in zip(batch, clips, strict=True):
        if not (path := folder / shot.path).is_file():  # of a batch that was interrupted
            save_clip(frames, path)


def _draw_elsewhere(left: Sequence[Batch], config: LoraAuditConfig, folder: Path, bar: Bar) -> None:
    """Start the workers, count their files, and stop them when this process is stopped."""
    require("accelerate", purpose="Drawing with several processes", extra="models")
    request = folder / "journal" / "drawing.json"
    write_text(request, json.dumps(to_request(left, config, folder)))
    output = request.with_suffix(".log")
    missing = [path for batch in left for shot in batch
               if not (path := folder / shot.path).is_file()]  # fmt: skip

    def count() -> None:
        still = [path for path in missing if not path.is_file()]
        if len(still) < len(missing):
            bar.update(len(missing) - len(still))
        missing[:] = still

    # Sums of another number of threads differ in their last digits, and so then do images.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with output.open("w+b") as log:
        # Nothing is written to their input: its end tells them that this process is gone, however
        # it ended. Their group is one of its own, so that all of them can be stopped together.
        workers = subprocess.Popen(
            _command(config, request), stdin=subprocess.PIPE, stdout=log, stderr=log,
            env=os.environ | threads, start_new_session=True,
        )  # fmt: skip
        try:
            while workers.poll() is None:
                count()
                with suppress(subprocess.TimeoutExpired):
                    workers.wait(GLANCE)
        finally:
            _stop(workers)
    count()
    if workers.returncode or missing:
        raise DrawingError(
            f"{config.processes} processes were to draw, "
            f"{counted(len(missing), 'image is', 'images are')} missing: "
            f"{output.read_text('utf-8', 'replace').strip()[-600:]}\nWhat was drawn is kept; "
            "the same command continues, also with --processes 1."
        )
    request.unlink()
    output.unlink()


def _stop(workers: subprocess.Popen) -> None:
    """End the launcher and all that it has started, by force where asking is not enough."""
    assert workers.stdin is not None
    workers.stdin.close()
    for way in ("SIGTERM", "SIGKILL"):
        with suppress(ProcessLookupError, PermissionError):  # none is left
            if os.name == "nt":
                workers.terminate()
            else:
                os.killpg(workers.pid, getattr(signal, way))
        with suppress(subprocess.TimeoutExpired):
            workers.wait(PATIENCE)
            if way == "SIGTERM":
                continue  # the launcher has gone; what it started may not have
    workers.wait()


def _end_with_the_input() -> None:
    """End this process, without a word, once its input ends: nobody waits for what it draws."""
    with suppress(OSError, ValueError):
        while os.read(0, 1024):
            pass
    os._exit(1)


def to_request(left: Sequence[Batch], config: LoraAuditConfig, folder: Path) -> dict[str, Any]:
    """Return everything that a worker must know, as JSON values."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    return {
        "lora": str(config.lora.resolve()),
        "folder": str(folder.resolve()),
        "settings": settings | {"model_config": config.model_config and str(config.model_config)},
        "batches": [[asdict(shot) for shot in batch] for batch in left],
    }


def _on_cpu(config: LoraAuditConfig) -> bool:
    """Return whether images are drawn by the processor."""
    return config.device == "cpu" or not torch.cuda.is_available()


def _command(config: LoraAuditConfig, request: Path) -> list[str]:
    # accelerate's own launcher starts one process where they are to compute on processors.
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(config.processes), "-m", __name__, str(request),
    ]  # fmt: skip


def work_off(request: Path) -> None:
    """Draw one process's share of a request, as `_command` starts this file."""
    threading.Thread(target=_end_with_the_input, daemon=True).start()
    from accelerate import PartialState

    values = json.loads(request.read_text("utf-8"))
    settings, folder = values["settings"], Path(values["folder"])
    state = PartialState(cpu=settings["device"] == "cpu")
    if config_path := settings["model_config"]:
        settings["model_config"] = Path(config_path)
    config = LoraAuditConfig(lora=Path(values["lora"]), images=folder,
                             **settings | {"device": str(state.device)})  # fmt: skip
    planned = [tuple(Shot(**shot) for shot in batch) for batch in values["batches"]]
    subject = Subject.of(config)
    with state.split_between_processes(planned) as share:
        for batch in share:
            draw_batch(batch, subject, config, folder)
    state.destroy_process_group()


if __name__ == "__main__":
    work_off(Path(sys.argv[1]))
