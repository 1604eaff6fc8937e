"""Compare: how near every generation is to every training image, and whether that finds copies.

A model cannot draw what its autoencoder cannot say. Where that is coarse, a perfect copy is far
from the image itself and close to the image's round trip through the autoencoder. So each training
image stands for itself and for its round trip, and the nearer of the two counts.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ... import demo
from ...shared.arrays import Float, Tensor
from ...shared.copies.features import PIXELS
from ...shared.copies.neighbours import Bounds
from ...shared.files.images import ImageFiles, save_png
from ...shared.files.schema import Reader
from ...shared.files.storage import StorageError, cache_folder, replace_atomically, write_text
from ...shared.wording import counted
from ..common.job import content_key
from ..common.result import versions
from ..common.sscd import similarity
from ..common.subject import Subject
from ..common.wording import percent
from .ask import Plan, Shot, roles_of
from .attack import as_images
from .clips import CONTENT
from .draw import Drawn
from .mark_clips import features_of, mark_clips, mark_planted, middle
from .result import MARKS, MATRIX, Generation, PositiveControl, Rate
from .rule import COPY, Marked, Roles, View, mark
from .verdicts import Evidence
from .work import Work

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

KNOWN = Reader(ValueError, "an answer of before", "")

SSCD = Bounds(own_factor=0.65, ratio=0.5)
"""Of one subject in one pose: stricter than between unrelated images, `shared.copies.features`."""
NEAR_PIXELS, NEAR_SSCD = 0.7, 0.8
"""Part of an image's yardstick below which a generation is nearer than controls are."""
PLANTED, ASKED = 24, 8
"""Planted images to compare with, and of how many the captions are prompts."""
STEPS, COND_SCALE = 20, 5.0
AT_ONCE = 4
ENOUGH = 0.75
"""Share of the planted images that must be found."""


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """Images in one kind of features, as generations are compared with them."""

    rows: Float[Tensor, " image number"]
    """Features of the images."""
    round_trips: Float[Tensor, " image number"]
    """Of what the autoencoder makes of them."""
    mirrored: Float[Tensor, " image number"] | None = None
    """Of the round trips, mirrored, for features that do not know an image again in the mirror."""

    def distances(self, generated: Float[Tensor, " row number"]) -> Tensor:
        """Return [row image] distances to the image or its round trip, whichever is nearer."""
        every = (self.rows, self.round_trips, self.mirrored)
        near = [torch.cdist(generated, rows) for rows in every if rows is not None]
        return torch.stack(near).amin(0)

    def view(self, generated: Float[Tensor, " row number"], bounds: Bounds, near: float) -> View:
        """Return how far generations and images are from the images."""
        return View(generated=self.distances(generated), images=self.distances(self.round_trips),
                    bounds=bounds, near=near)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """What the verdicts rest on."""

    generations: tuple[Generation, ...]
    rows: Float[Tensor, " generation dimension"]
    """Their embeddings."""
    evidence: Evidence
    ceilings: Float[Tensor, " image"]
    """Cosine of each image and its round trip."""
    epochs: tuple[tuple[Tensor, Tensor], ...]
    """Per saved epoch, for each training image its most similar generation's cosine, and the mark
    of its own words."""
    instrument: PositiveControl


def compare(plan: Plan, drawn: Drawn, work: Work) -> Compared:
    """Compare all images, and keep the matrix with the job."""
    folder, count = work.job.folder, len(plan.training.trained)
    instrument = positive_control(work)
    shots = [*plan.shots, *(shot for _, of_epoch in plan.epochs for shot in of_epoch)]
    trips = (
        torch.stack([middle(rows) for rows in features_of(drawn.round_trips, work)])
        if work.subject.video else work.drawn.rows(drawn.round_trips)
    )  # fmt: skip
    files = [folder / shot.path for shot in shots]
    rows, matrix, marked = mark_shots(plan, shots, files, drawn.round_trips, work)
    asked = slice(len(plan.shots))
    with replace_atomically(folder / MATRIX) as part, part.open("wb") as file:
        np.savez_compressed(file, matrix=matrix[asked].numpy(),
                            marks=marked.marks[asked].to(torch.uint8).numpy())  # fmt: skip
    evidence = evidence_of(plan.shots, matrix, marked, plan.groups, count)
    epochs, start = [], len(plan.shots)
    for _, of_epoch in plan.epochs:
        part = slice(start, start := start + len(of_epoch))
        epochs.append((matrix[part, :count].amax(0),
                       (marked.marks * marked.own)[part, :count].amax(0)))  # fmt: skip
    nearest = matrix[asked, :count].max(1)
    return Compared(
        generations=tuple(
            Generation(path=shot.path, prompt=shot.prompt, asked=shot.asked, source=shot.source,
                       seed=shot.seed, lora=shot.mode != "off", nearest=image, similarity=cosine,
                       mark=MARKS[int(grave)])
            for shot, image, cosine, grave in zip(
                plan.shots, nearest.indices.tolist(), nearest.values.tolist(),
                marked.marks[asked, :count].amax(1), strict=True,
            )
        ),
        rows=rows[asked],
        evidence=evidence,
        ceilings=(plan.features * trips).sum(1).clamp(-1, 1),
        epochs=tuple(epochs),
        instrument=instrument,
    )  # fmt: skip


def mark_shots(
    plan: Plan, shots: Sequence[Shot], files: Sequence[Path], round_trips: Sequence[Path],
    work: Work,
) -> tuple[Tensor, Tensor, Marked]:  # fmt: skip
    """Return what images are to the training images, by the audit's rule.

    Args:
        plan: Holds the training images.
        shots: What was asked.
        files: The image of each shot.
        round_trips: The training images as the autoencoder gives them back.
        work: Of the audit.

    Returns:
        Embeddings of the images [generation dimension], their cosines with the training images
        [generation image], and their marks.
    """
    if work.subject.video:
        return mark_clips(files, round_trips, work, roles_of(shots, plan.training, plan.groups))
    trips = work.drawn.rows(round_trips)
    rows = work.embed(work.drawn, files, "similarity")
    known = [plan.training.path_of(image) for image in plan.training.images]
    pixels = pixel_references(ImageFiles(known), ImageFiles(round_trips))
    marked = mark(
        views_on(pixels, PIXELS.rows(ImageFiles(files)),
                 References(rows=plan.features, round_trips=trips), rows),
        roles_of(shots, plan.training, plan.groups),
    )  # fmt: skip
    matrix = torch.maximum(similarity(rows, plan.features), similarity(rows, trips))
    return rows, matrix, marked


def views_on(
    pixels: References, made: Float[Tensor, " row pixel"],
    sscd: References, rows: Float[Tensor, " row dimension"],
) -> tuple[View, View]:  # fmt: skip
    """Return how far generations are from images: by pixels, the arrangement, then by SSCD."""
    return pixels.view(made, PIXELS.bounds, NEAR_PIXELS), sscd.view(rows, SSCD, NEAR_SSCD)


def evidence_of(
    shots: Sequence[Shot], matrix: Float[Tensor, "generation image"], marked: Marked,
    groups: Sequence[frozenset[int]], trained: int,
) -> Evidence:  # fmt: skip
    """Return what verdicts rest on; further generations than the shots may follow in the matrix."""
    on, off = ([i for i, shot in enumerate(shots) if shot.mode == mode] for mode in ("on", "off"))
    held_out = [i for i in range(trained, len(groups)) if min(groups[i]) >= trained]
    return Evidence(matrix=matrix, marked=marked, on=on, off=off, trained=trained,
                    held_out=held_out)  # fmt: skip


def pixel_references(images: "Sequence[Image]", round_trips: "Sequence[Image]") -> References:
    """Return images by their pixels; what comes back mirrored is known again."""
    from PIL import ImageOps

    mirrored = torch.cat([PIXELS.rows([ImageOps.mirror(image)]) for image in round_trips])
    return References(rows=PIXELS.rows(images), round_trips=PIXELS.rows(round_trips),
                      mirrored=mirrored)  # fmt: skip


def positive_control(work: Work) -> PositiveControl:
    """Return whether the instrument works today: the demo's planted duplicates must be found.

    The same features, number of seeds and rule as for the LoRA, on a model of which the truth is
    known. The same question is answered once.
    """
    subject = Subject(demo.NAME, device=work.subject.device)
    key = content_key(subject.fingerprint, work.features.name, subject.device, subject.dtype,
                      versions(), [PLANTED, ASKED, STEPS, COND_SCALE, ENOUGH],
                      work.config.images_per_prompt, [NEAR_PIXELS, NEAR_SSCD],
                      astuple(SSCD), work.subject.video and astuple(CONTENT))  # fmt: skip
    path = cache_folder() / "positive-control" / f"{key}.json"
    try:
        return KNOWN.read(path, PositiveControl)
    except (OSError, ValueError):
        answer = _find_planted(subject, work, path.with_suffix(""))
    if answer.works:  # a failure is looked at again
        try:
            write_text(path, json.dumps(asdict(answer)))
        except StorageError as error:
            logger.warning("The positive control is not kept for next time: %s", error)
    return answer


def _find_planted(subject: Subject, work: Work, folder: Path) -> PositiveControl:
    """Answer anew; what was drawn stands in `folder`, so that a stopped one goes on."""
    denoiser, count = subject.denoiser, work.config.images_per_prompt
    planted = [c.text for c in demo.captions() if c.group == "verbatim"][:PLANTED]
    images = [demo.training_image(caption) for caption in planted]
    latents = [denoiser.encode_images([image]) for image in images]
    trips = [trip for each in latents for trip in as_images(denoiser.decode(each))]
    asked = [(place, seed) for place in range(ASKED) for seed in range(count)]
    files = [folder / f"{place}-{seed}.png" for place, seed in asked]
    there = sum(file.is_file() for file in files)
    with closing(work.bars("positive control", len(asked), there, "image")) as bar:
        for start in range(0, len(asked), AT_ONCE):
            batch = files[start : start + AT_ONCE]
            if not (left := [file for file in batch if not file.is_file()]):
                continue
            places, seeds = zip(*asked[start : start + AT_ONCE], strict=True)
            made = denoiser.generate([planted[place] for place in places], seeds, steps=STEPS,
                                     cond_scale=COND_SCALE)  # fmt: skip
            for file, image in zip(batch, made, strict=True):
                if file in left:
                    save_png(image, file)
            bar.update(len(left))
    drawn = list(ImageFiles(files))
    embed = work.encoder.embed
    roles = Roles(
        own=[frozenset([place]) for place, _ in asked], on=[True] * len(asked),
        plain=[True] * len(asked), groups=[frozenset([i]) for i in range(PLANTED)],
    )  # fmt: skip
    marked = mark_planted(drawn, trips, roles) if work.subject.video else mark(
        views_on(pixel_references(images, trips), PIXELS.rows(drawn),
                 References(rows=embed(images), round_trips=embed(trips)), embed(drawn)),
        roles,
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    found = Rate.of(int((marked.marks[:, :ASKED] == COPY).any(0).sum()), ASKED)
    works = found.count >= ENOUGH * ASKED
    frames = " for frames (motions are not part of this test)" if work.subject.video else ""
    detail = (
        f"Of {ASKED} images planted in the bundled demo model, {found.count} were found by the "
        f"same features and the same rule{frames}, from {counted(count, 'seed', 'seeds')} each"
    )
    failed = f"; {percent(ENOUGH)} are needed. Is the installation whole? Type: unmemorize doctor"
    return PositiveControl(found=found, works=works, detail=f"{detail}{'' if works else failed}.")
