"""Proof that the instrument works today: the demo model's planted duplicates must be found.

The same features, thresholds and rule as for the LoRA, on a model of which the truth is known.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from ...shared.files.storage import StorageError, write_text
from ..common.job import content_key
from ..common.measure import Bars
from ..common.result import versions
from ..common.similarity import PIXELS
from ..common.sscd import Sscd
from ..common.subject import DEMO, Subject
from ..common.wording import percent
from .attack import as_images
from .comparing import References
from .feature_cache import default_folder
from .result import PositiveControl, Rate
from .thresholds import thresholds
from .verdicts import rate

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...shared.models.adapter import PipelineDenoiser

logger = logging.getLogger(__name__)

PLANTED, ASKED = 24, 8
"""Planted images to compare with, and how many of their captions are asked; as many others are."""
SEED, STEPS, COND_SCALE = 0, 20, 5.0
AT_ONCE = 4
ENOUGH = 0.75
"""Share of the asked that must be found."""


def positive_control(encoder: Sscd, features: str, device: str, bars: Bars) -> PositiveControl:
    """Return whether the planted duplicates were found; the same question is answered once.

    Args:
        encoder: Of the audit.
        features: Its name with its weights' hash.
        device: Where the demo model runs.
        bars: Makes the progress bar.
    """
    subject = Subject(DEMO, device=device)
    key = content_key(subject.fingerprint, features, device, subject.dtype, versions(),
                      [PLANTED, ASKED, SEED, STEPS, COND_SCALE, ENOUGH])  # fmt: skip
    path = default_folder() / "positive-control" / f"{key}.json"
    try:
        known = json.loads(path.read_text("utf-8"))
        return PositiveControl(**known | {"found": Rate(**known["found"])})
    except (OSError, ValueError, TypeError, KeyError):
        answer = _ask(subject, encoder, bars)
    if answer.works:  # a failure is looked at again
        try:
            write_text(path, json.dumps(asdict(answer)))
        except StorageError as error:
            logger.warning("The positive control is not kept for next time: %s", error)
    return answer


def _ask(subject: Subject, encoder: Sscd, bars: Bars) -> PositiveControl:
    from ... import demo

    planted, others = ([c.text for c in demo.captions() if c.group == group]
                       for group in ("verbatim", "held_out"))  # fmt: skip
    planted = planted[:PLANTED]
    references = _refer(subject.denoiser, encoder, [demo.training_image(c) for c in planted])
    bar = bars("positive control", 2 * ASKED, 0, "image")
    best = []
    try:
        for prompts in (planted, others):
            drawn = []
            for start in range(0, ASKED, AT_ONCE):
                part = prompts[start : start + AT_ONCE]
                seeds = [SEED] * len(part)
                drawn += subject.denoiser.generate(part, seeds, steps=STEPS, cond_scale=COND_SCALE)
                bar.update(len(part))
            best.append(references.similarities(encoder.embed(drawn)).amax(0))
    finally:
        bar.close()
    limits = thresholds(best[1], torch.empty(0), references.peers(range(PLANTED)))
    assert limits.verbatim is not None  # twice PLANTED are enough controls
    found = rate(int((best[0][:ASKED] > limits.verbatim).sum()), ASKED)
    works = found.count >= ENOUGH * ASKED
    detail = (
        f"Of {ASKED} images planted in the bundled demo model, {found.count} were found by the "
        f"same features and the same rule (threshold {limits.verbatim:.2f})"
    )
    failed = f"; {percent(ENOUGH)} are needed. Is the installation whole? Type: unmemorize doctor"
    return PositiveControl(found=found, works=works, detail=f"{detail}{'' if works else failed}.")


def _refer(denoiser: "PipelineDenoiser", encoder: Sscd, images: "Sequence[Image]") -> References:
    latents = [denoiser.encode_images([image]) for image in images]
    trips = [trip for each in latents for trip in as_images(denoiser.decode(each))]
    return References(
        rows=encoder.embed(images), drawn=encoder.embed(trips), layouts=PIXELS.rows(trips)
    )
