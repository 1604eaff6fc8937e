"""Mark: what generated clips are to a training folder of clips and stills, content and motion.

A copy is one of content, frame by frame. A copied motion in other content counts as an image does
whose layout alone comes back: it is pointed at, and forbids to say that nothing did.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from ...shared.arrays import Float, Tensor
from ...shared.files.images import read_frames, save_png
from ...shared.files.weights import file_sha256
from .clips import FRAMES, MOST, SIDE, judge_clips
from .result import DuplicateGroup
from .rule import COPY, NEAR, Marked, Roles
from .work import Work

if TYPE_CHECKING:
    from PIL.Image import Image


def mark_clips(
    files: Sequence[Path], round_trips: Sequence[Path], work: Work, roles: Roles
) -> tuple[Tensor, Tensor, Marked]:
    """Return what `compare.mark_shots` does, of clips.

    Training clips stand as the autoencoder gives their frames back. Cosines are the mean over a
    generated clip's frames of the most similar frame, of a still the most similar of all.
    """
    marks = judge_clips([pixels_of(path) for path in files],
                        [pixels_of(path) for path in round_trips], roles)  # fmt: skip
    content, motion = marks.content, marks.motion
    moved = (motion.marks == COPY) & motion.own & ~stills_of(round_trips)
    marked = Marked(
        marks=content.marks.maximum(NEAR * moved), own=content.own | moved,
        alike=torch.stack([moved, content.alike[0] & content.own]),
        closeness=content.closeness, controls=content.controls,
    )  # fmt: skip
    made, known = features_of(files, work), features_of(round_trips, work)
    matrix = torch.stack([
        torch.stack([best.amax() if len(rows) == 1 else best.mean()
                     for rows in known for best in [(clip @ rows.T).amax(1)]])
        for clip in made
    ])  # fmt: skip
    return torch.stack([middle(rows) for rows in made]), matrix.clamp(-1, 1), marked


def stills_of(files: Sequence[Path]) -> Tensor:
    """Return [file] which have one frame, and so no motion to be copied."""
    return torch.tensor([len(read_frames(path, 2)) == 1 for path in files])


def mark_planted(made: "Sequence[Image]", trips: "Sequence[Image]", roles: Roles) -> Marked:
    """Return marks of the positive control's images as clips of one frame."""
    return judge_clips([_pixels([image]) for image in made],
                       [_pixels([image]) for image in trips], roles).content  # fmt: skip


def pixels_of(path: Path) -> Float[Tensor, "frame 3 side side"]:
    """Return the frames of a clip that are compared, small, in 0..1."""
    return _pixels(read_frames(path, MOST))


def _pixels(frames: "Sequence[Image]") -> Tensor:
    rows = (torch.from_numpy(np.array(frame)).permute(2, 0, 1).float() / 255 for frame in frames)
    return torch.cat([F.interpolate(row[None], (SIDE, SIDE), mode="area") for row in rows])


def features_of(files: Sequence[Path], work: Work) -> list[Float[Tensor, "frame dimension"]]:
    """Return the embeddings of each clip's frames, `FRAMES` at most; they are kept with the job."""
    written = [frame_files(path, work.job.folder / "journal" / "frames", FRAMES) for path in files]
    rows = work.embed(work.drawn, [path for paths in written for path in paths], "frames")
    return list(rows.split([len(paths) for paths in written]))


def frame_files(path: Path, folder: Path, most: int) -> list[Path]:
    """Return the frames of a clip as files, written where they are missing; of a still its own."""
    frames = read_frames(path, most)
    if len(frames) == 1:
        return [path]
    folder = folder / f"{file_sha256(path)[:32]}-{most}"
    named = [folder / f"{place:03d}.png" for place in range(len(frames))]
    for frame, file in zip(frames, named, strict=True):
        if not file.is_file():
            save_png(frame, file)
    return named


def middle(rows: Float[Tensor, "frame dimension"]) -> Float[Tensor, " dimension"]:
    """Return the embedding that stands for a clip: the mean over its frames, of length 1."""
    return F.normalize(rows.mean(0), dim=0)


def shared_groups(moments: Sequence[Sequence[DuplicateGroup]]) -> tuple[DuplicateGroup, ...]:
    """Return groups of clips that are near-duplicates at every moment.

    Args:
        moments: Groups of the frames at each.
    """
    first, *others = moments
    places = [{i: n for n, group in enumerate(groups) for i in group.images} for groups in others]
    found = []
    for group in first:
        together: dict[tuple[int | None, ...], list[int]] = {}
        for image in group.images:
            together.setdefault(tuple(place.get(image) for place in places), []).append(image)
        found += [
            DuplicateGroup(images=tuple(images), exact=group.exact, similarity=group.similarity)
            for key, images in together.items() if None not in key and len(images) > 1
        ]  # fmt: skip
    return tuple(sorted(found, key=lambda group: (-len(group.images), group.images)))
