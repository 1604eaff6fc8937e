"""Which generated clips copy the content of a training clip, and which its motion.

After Chen, Liu, Shah et al. 2024, arXiv:2410.21669: content is compared frame by frame, motion by
what changes from frame to frame, and motions that anybody makes are no copies. The paper takes
SSCD and optical flow; here content is compared by pixels, and motion by where and when pixels
change, which neither colours nor contrasts move.

Both are judged as images are, by `rule.mark`: each training clip has a yardstick of its own. For a
motion there is one more bar: it has to come nearer to the training clip than panning, zooming and
turning that clip's own still do. So a training clip that is itself such a motion is never copied.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ...shared.arrays import Float, Tensor
from ...shared.copies.neighbours import Bounds
from .rule import NONE, Marked, Roles, View, mark

MOST = 16
"""Frames of a clip that are compared, equally far apart in time."""
FRAMES = 8
"""Times, equally far apart from the first frame to the last, at which clips are compared."""
SIDE, GRID = 32, 8
"""Pixels in the side of the frames, and places in the side of the maps of change."""
NEAR = 0.7
"""Part of a yardstick below which a generation is nearer than controls are."""
CONTENT = Bounds(own_factor=0.65, ratio=0.55)
"""How near is a copy of a content: of the mean over frames, which varies less than one image."""
MOTION = Bounds(own_factor=0.65, ratio=0.5)
"""How near is a copy of a motion."""
REACHES = (0.06, 0.15, 0.3)
"""How far ordinary motions go, as a part of the frame's side: what they shift, or scale by."""
TURNS = (5.0, 15.0, 45.0)
"""Degrees that ordinary motions turn by."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipMarks:
    """What the rule says of every generated and every training clip."""

    content: Marked
    motion: Marked
    """Without what ordinary motions reach as well."""
    ordinary: Float[Tensor, " clip"]
    """How near the nearest ordinary motion of a training clip's own still comes to its motion."""


def judge_clips(generated: Sequence[Tensor], training: Sequence[Tensor], roles: Roles) -> ClipMarks:
    """Return which generated clips copy the content, and which the motion, of which training clips.

    Args:
        generated: Each [frame 3 height width] in 0..1, of any length and size.
        training: The same; a still is a clip of one frame. It has no motion to be copied, and its
            content is copied where one frame of a generated clip shows it.
        roles: Of these: what was asked, and which training clips count as one.
    """
    made, known = small(generated), small(training)
    content = mark([View(generated=frame_distances(made, known),
                         images=frame_distances(known, known), bounds=CONTENT, near=NEAR)],
                   roles)  # fmt: skip
    moving = motion_rows(known)
    apart = torch.cdist(motion_rows(made), moving)
    motion = mark(
        [View(generated=apart, images=torch.cdist(moving, moving), bounds=MOTION, near=NEAR)], roles
    )
    ordinary = torch.stack([
        torch.cdist(motion_rows(ordinary_motions(clip[0])), rows[None]).min()
        for clip, rows in zip(known, moving, strict=True)
    ])  # fmt: skip
    return ClipMarks(content=content, motion=_beyond(motion, apart, ordinary), ordinary=ordinary)


def _beyond(motion: Marked, apart: Tensor, ordinary: Float[Tensor, " clip"]) -> Marked:
    """Return marks of motions without those that an ordinary motion comes about as near to."""
    far = apart >= MOTION.own_factor * ordinary
    return Marked(
        marks=motion.marks.masked_fill(far, NONE), own=motion.own, controls=motion.controls,
        alike=motion.alike & ~far,
        closeness=motion.closeness.maximum(apart / (MOTION.own_factor * ordinary)),
    )  # fmt: skip


def small(clips: Sequence[Tensor]) -> list[Tensor]:
    """Return clips in small frames, each [frame 3 side side].

    Raises:
        ValueError: There is none, or one is no clip.
    """
    if not clips or any(clip.ndim != 4 or clip.shape[1] != 3 or not len(clip) for clip in clips):
        shapes = [tuple(clip.shape) for clip in clips][:3]
        raise ValueError(f"Clips are [frame 3 height width] with a frame at least, got {shapes}.")
    return [F.interpolate(clip.float(), (SIDE, SIDE), mode="area") for clip in clips]


def frame_distances(made: Sequence[Tensor], known: Sequence[Tensor]) -> Float[Tensor, " row clip"]:
    """Return how far frames of clips are from the nearest frame of others, whenever that stands.

    The mean over the frames of a row; against a still the nearest of them.

    Args:
        made: From `small`.
        known: The same; a still has one frame.
    """
    pixels, lengths = torch.cat([*known]).flatten(1), [len(clip) for clip in known]
    rows = []
    for clip in made:
        apart = [part.amin(1) for part in torch.cdist(clip.flatten(1), pixels).split(lengths, 1)]
        rows.append(torch.stack([
            part.amin() if length == 1 else part.mean()
            for part, length in zip(apart, lengths, strict=True)
        ]))  # fmt: skip
    return torch.stack(rows)


def motion_rows(clips: Sequence[Tensor] | Tensor) -> Float[Tensor, " clip number"]:
    """Return where and when clips change, as unit vectors; zeros for a still.

    The root mean square difference of each of `FRAMES` times to the next, over channels and over
    squares of pixels. The directions of colours are lost on purpose: a motion is the same whatever
    moves.

    Args:
        clips: From `small`, each [frame 3 side side].
    """
    sampled = []
    for clip in clips:  # each time is a mean of its two nearest frames
        time = torch.linspace(0, len(clip) - 1, FRAMES, dtype=torch.float64)
        before = time.floor().long()
        after = (before + 1).clamp(max=len(clip) - 1)
        share = (time % 1).float()[:, None, None, None]
        sampled.append(torch.lerp(clip[before], clip[after], share))
    change = torch.stack(sampled).diff(dim=1).square().mean(2)
    maps = F.avg_pool2d(change, SIDE // GRID).sqrt()
    return F.normalize(maps.flatten(1), dim=1)


def ordinary_motions(still: Float[Tensor, "3 side side"]) -> Tensor:
    """Return what anybody makes of a still, [motion frame 3 side side].

    It rests; it pans in eight directions, zooms in and out and turns both ways, each little,
    further and far. What comes in from outside repeats the edge.
    """
    progress = torch.linspace(-0.5, 0.5, FRAMES)
    eight = [(math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)) for k in range(8)]
    maps = [_maps(progress * 0)]
    for reach, degrees in zip(REACHES, TURNS, strict=True):
        maps += [_maps(progress * 0, 2 * reach * right * progress, 2 * reach * down * progress)
                 for right, down in eight]  # fmt: skip
        maps += [_maps(progress * 0, scale=1 + 2 * sign * reach * progress) for sign in (-1, 1)]
        maps += [_maps(sign * math.radians(degrees) * progress) for sign in (-1, 1)]
    flat = torch.cat(maps)
    grid = F.affine_grid(flat, [len(flat), 3, SIDE, SIDE], align_corners=False)
    moved = F.grid_sample(still.expand(len(flat), -1, -1, -1), grid, padding_mode="border",
                          align_corners=False)  # fmt: skip
    return moved.unflatten(0, (-1, FRAMES))


def _maps(
    angle: Tensor, right: Tensor | float = 0.0, down: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
) -> Tensor:  # fmt: skip
    """Return affine maps [frame 2 3] of places in -1..1; angles in radians."""
    ones = torch.ones_like(angle)
    rows = (scale * angle.cos(), -scale * angle.sin(), right * ones,
            scale * angle.sin(), scale * angle.cos(), down * ones)  # fmt: skip
    return torch.stack(rows, 1).unflatten(1, (2, 3))
