"""Compare: how near every generation is to every training image, and whether that finds copies.

A model cannot draw what its autoencoder cannot say. Where that is coarse, a perfect copy is far
from the image itself and close to the image's round trip through the autoencoder. So each training
image stands for itself and for its round trip, and the nearer of the two counts.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ... import demo
from ...shared.arrays import Float, Tensor
from ...shared.files.images import ImageFiles
from ...shared.files.storage import StorageError, cache_folder, replace_atomically, write_text
from ..common.job import content_key
from ..common.result import versions
from ..common.similarity import PIXELS
from ..common.sscd import similarity
from ..common.subject import Subject
from ..common.wording import percent
from .ask import Plan
from .attack import as_images
from .draw import Drawn
from .neighbours import Index
from .result import MATRIX, Generation, PositiveControl, Rate
from .verdicts import Evidence, thresholds
from .work import Work

logger = logging.getLogger(__name__)

PLANTED, ASKED = 24, 8
"""Planted images to compare with; of their captions, and of others, so many are prompts."""
SEED, STEPS, COND_SCALE = 0, 20, 5.0
AT_ONCE = 4
ENOUGH = 0.75
"""Share of the planted images that must be found."""


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """Training images, held-out ones included, as generations are compared with them."""

    rows: Float[Tensor, " image dimension"]
    """Embeddings of the images, unit vectors."""
    round_trips: Float[Tensor, " image dimension"]
    """Embeddings of their round trips."""

    def similarities(self, generated: Float[Tensor, " row dimension"]) -> Tensor:
        """Return [row image] cosines to the image or its round trip, whichever is nearer."""
        return torch.maximum(
            similarity(generated, self.rows), similarity(generated, self.round_trips)
        )

    def nearest(
        self, generated: Float[Tensor, " row dimension"], count: int
    ) -> tuple[list[int], list[float]]:
        """Return the nearest of the first `count` images, and its cosine, for each row."""
        index = Index(torch.cat([self.rows[:count], self.round_trips[:count]]))
        cosines, places = index.search(generated)
        return (places[:, 0] % count).tolist(), cosines[:, 0].tolist()

    def peers(self, among: Sequence[int]) -> Float[Tensor, " row"]:
        """Return how near each image of `among`, as the model would draw it, is to any other.

        That is what an image of the same subject reaches without being a copy. Leave
        near-duplicates out: a copy of one is a copy of the other.
        """
        chosen = torch.tensor(list(among))
        count = len(chosen)
        if count < 2:
            return torch.empty(0)
        index = Index(torch.cat([self.rows[chosen], self.round_trips[chosen]]))
        # An image meets itself and its own round trip; the third is another's, if not before.
        cosines, places = index.search(self.round_trips[chosen], k=3)
        other = places % count != torch.arange(count)[:, None]
        return cosines.where(other, torch.tensor(-torch.inf)).amax(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """What the verdicts rest on."""

    generations: tuple[Generation, ...]
    rows: Float[Tensor, " generation dimension"]
    """Their embeddings."""
    evidence: Evidence
    ceilings: Float[Tensor, " image"]
    """Cosine of each image and its round trip."""
    peers: Float[Tensor, " control"]
    """How near distinct training images are to each other."""
    epochs: tuple[Tensor, ...]
    """Per saved epoch, for each training image its most similar generation's cosine."""
    instrument: PositiveControl


def compare(plan: Plan, drawn: Drawn, work: Work) -> Compared:
    """Compare all images, and keep the matrix with the job."""
    folder, count = work.job.folder, len(plan.training.trained)
    instrument = positive_control(work)
    references = References(rows=plan.features, round_trips=work.drawn.rows(drawn.round_trips))
    files = [folder / shot.path for shot in plan.shots]
    rows = work.embed(work.drawn, files, "similarity")
    matrix = references.similarities(rows)
    with replace_atomically(folder / MATRIX) as part, part.open("wb") as file:
        np.savez_compressed(file, matrix=matrix.numpy())
    small, trips = (PIXELS.rows(ImageFiles(paths)) for paths in (files, drawn.round_trips))
    on, off = ([i for i, shot in enumerate(plan.shots) if shot.mode == mode]
               for mode in ("on", "off"))  # fmt: skip
    evidence = Evidence(
        matrix=matrix, layouts=1 - torch.cdist(small, trips) / small.shape[1] ** 0.5,
        on=on, off=off, trained=count,
    )  # fmt: skip
    again = {image for group in plan.duplicates for image in group.images[1:]}
    epochs = []
    for _, shots in plan.epochs:
        made = work.embed(work.drawn, [folder / shot.path for shot in shots], "similarity")
        epochs.append(references.similarities(made).amax(0)[:count])
    return Compared(
        generations=tuple(
            Generation(path=shot.path, prompt=shot.prompt, asked=shot.asked, source=shot.source,
                       seed=shot.seed, lora=shot.mode != "off", nearest=image, similarity=cosine)
            for shot, image, cosine in zip(
                plan.shots, *references.nearest(rows, count), strict=True
            )
        ),
        rows=rows,
        evidence=evidence,
        ceilings=(references.rows * references.round_trips).sum(1).clamp(-1, 1),
        peers=references.peers([i for i in range(count) if i not in again]),
        epochs=tuple(epochs),
        instrument=instrument,
    )  # fmt: skip


def positive_control(work: Work) -> PositiveControl:
    """Return whether the instrument works today: the demo's planted duplicates must be found.

    The same features, thresholds and rule as for the LoRA, on a model of which the truth is known.
    The same question is answered once.
    """
    subject = Subject(demo.NAME, device=work.subject.device)
    key = content_key(subject.fingerprint, work.features.name, subject.device, subject.dtype,
                      versions(), [PLANTED, ASKED, SEED, STEPS, COND_SCALE, ENOUGH])  # fmt: skip
    path = cache_folder() / "positive-control" / f"{key}.json"
    try:
        known = json.loads(path.read_text("utf-8"))
        return PositiveControl(**known | {"found": Rate(**known["found"])})
    except (OSError, ValueError, TypeError, KeyError):
        answer = _find_planted(subject, work)
    if answer.works:  # a failure is looked at again
        try:
            write_text(path, json.dumps(asdict(answer)))
        except StorageError as error:
            logger.warning("The positive control is not kept for next time: %s", error)
    return answer


def _find_planted(subject: Subject, work: Work) -> PositiveControl:
    denoiser, embed = subject.denoiser, work.encoder.embed
    planted, others = ([c.text for c in demo.captions() if c.group == group]
                       for group in ("verbatim", "held_out"))  # fmt: skip
    images = [demo.training_image(caption) for caption in planted[:PLANTED]]
    latents = [denoiser.encode_images([image]) for image in images]
    trips = [trip for each in latents for trip in as_images(denoiser.decode(each))]
    references = References(rows=embed(images), round_trips=embed(trips))
    best = []
    with closing(work.bars("positive control", 2 * ASKED, 0, "image")) as bar:
        for prompts in (planted, others):
            drawn = []
            for start in range(0, ASKED, AT_ONCE):
                part = prompts[start : start + AT_ONCE]
                seeds = [SEED] * len(part)
                drawn += denoiser.generate(part, seeds, steps=STEPS, cond_scale=COND_SCALE)
                bar.update(len(part))
            best.append(references.similarities(embed(drawn)).amax(0))
    limits = thresholds(best[1], torch.empty(0), references.peers(range(PLANTED)))
    assert limits.verbatim is not None  # twice PLANTED are enough controls
    found = Rate.of(int((best[0][:ASKED] > limits.verbatim).sum()), ASKED)
    works = found.count >= ENOUGH * ASKED
    detail = (
        f"Of {ASKED} images planted in the bundled demo model, {found.count} were found by the "
        f"same features and the same rule (threshold {limits.verbatim:.2f})"
    )
    failed = f"; {percent(ENOUGH)} are needed. Is the installation whole? Type: unmemorize doctor"
    return PositiveControl(found=found, works=works, detail=f"{detail}{'' if works else failed}.")
