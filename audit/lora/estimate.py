"""How long the images of an audit will take, said before they are begun."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ...shared.wording import counted
from ..common.subject import Subject
from .config import LoraAuditConfig
from .drawing import Batch, unfinished


@torch.no_grad()  # a model that is loaded in inference mode could never be switched again
def estimate(
    planned: Sequence[Batch], subject: Subject, folder: Path, config: LoraAuditConfig
) -> str:
    """Return a sentence with the time that the missing images will take, by one timed step."""
    left = sum(len(batch.shots) for batch in unfinished(planned, folder))
    if not left:
        return "All images are there."
    denoiser, rows = subject.denoiser, 2 * config.batch_size
    sigma = denoiser.sigmas(config.generation_steps)[0]
    noise = denoiser.initial_noise([0] * rows, sigma)
    empty = denoiser.unconditional()[[0] * rows]
    seconds = []
    for _ in range(2):  # the first call also warms up
        start = time.perf_counter()
        denoiser.denoise(noise, sigma, empty).cpu()
        seconds.append(time.perf_counter() - start)
    total = seconds[-1] * config.generation_steps * left / config.batch_size / config.processes
    return f"{counted(left, 'image is', 'images are')} to be drawn: about {_told(total)}."


def _told(seconds: float) -> str:
    if seconds < 90:
        return counted(max(1, round(seconds)), "second", "seconds")
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
