"""Content and motion of clips: told apart, and no usual motion is called copied."""

import pytest
import torch
from unmemorize.audit.lora.clips import (
    FRAMES,
    frame_distances,
    judge_clips,
    motion_rows,
    ordinary_motions,
    small,
)
from unmemorize.audit.lora.rule import COPY, Roles

SIDE, LENGTH = 32, 9


def ground(seed: int) -> torch.Tensor:
    """Return a soft coloured ground [3 side side]."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, SIDE, mode="bilinear")[0]


def path(seed: int) -> torch.Tensor:
    """Return a crooked way through four places, [frame 2] in pixels."""
    corners = 6 + 20 * torch.rand(4, 2, generator=torch.Generator().manual_seed(1000 + seed))
    time = torch.linspace(0, 3 - 1e-6, LENGTH)
    start = time.long()
    return torch.lerp(corners[start], corners[start + 1], (time % 1)[:, None])


def clip(content: int, motion: int) -> torch.Tensor:
    """Return a disc of one content that moves in one way, [frame 3 side side]."""
    colour = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(500 + content))
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    frames = []
    for right, down in path(motion):
        inside = ((x - right) ** 2 + (y - down) ** 2).sqrt() < 5
        frames.append(torch.where(inside, colour, ground(content)))
    return torch.stack(frames)


def pan(content: int, reach: float) -> torch.Tensor:
    """Return a still that pans to the right, further than the little steps of the controls."""
    wide = torch.cat([ground(content), ground(content + 50)], 2)
    return torch.stack([wide[:, :, int(k * reach) : int(k * reach) + SIDE] for k in range(LENGTH)])


TRAINING = [clip(seed, seed) for seed in range(30)]


def roles(generated: int, owns: dict[int, int]) -> Roles:
    """Return roles of plain generations, each for the caption of one training clip."""
    return Roles(own=[frozenset([owns[g]]) for g in range(generated)], on=[True] * generated,
                 plain=[True] * generated, groups=[frozenset([i]) for i in range(30)])  # fmt: skip


def judged(first: list[torch.Tensor]):
    """Judge these clips for the first captions among others that copy nothing."""
    others = [clip(200 + seed, 300 + seed) for seed in range(30 - len(first))]
    made = [*first, *others]
    return judge_clips(made, TRAINING, roles(len(made), dict(enumerate(range(30)))))


def test_content_and_motion_are_told_apart():
    made = judged([clip(0, 0), clip(1, 101), clip(102, 2), clip(103, 103)])
    content, motion = ((marks.marks == COPY).any(1)[:4].tolist()
                       for marks in (made.content, made.motion))  # fmt: skip
    assert content == [True, True, False, False]
    assert motion == [True, False, True, False]
    assert (made.content.marks == COPY)[1].nonzero().flatten().tolist() == [1]
    assert (made.motion.marks == COPY)[2].nonzero().flatten().tolist() == [2]
    assert not (made.content.marks == COPY)[4:].any()
    assert not (made.motion.marks == COPY)[4:].any()


def test_colours_and_contrast_move_no_motion():
    first = clip(0, 0)
    faint = 0.5 + 0.1 * (first - 0.5)
    rows = motion_rows(small([first, faint, 1 - first, clip(7, 0), clip(7, 8)]))
    apart = torch.cdist(rows[:1], rows)[0]
    assert apart[1:3].max() < 1e-3
    assert 3 * apart[3] < apart[4]


def test_a_usual_motion_is_not_called_copied():
    """Training clip 0 pans; a generation pans just as far over other content."""
    usual = [pan(400, 1.2), *TRAINING[1:]]
    made = [pan(0, 1.2), *(clip(200 + seed, 300 + seed) for seed in range(29))]
    found = judge_clips(made, usual, roles(30, dict(enumerate(range(30)))))
    assert not (found.motion.marks == COPY)[0].any()
    # The yardstick of other clips alone would have called it one.
    rows = motion_rows(small([made[0], *usual]))
    apart = torch.cdist(rows[:1], rows[1:])[0]
    assert apart.argmin() == 0
    assert apart[0] < 0.65 * apart[1:].min()
    assert found.ordinary[0] < found.ordinary[1:].min()


def test_a_still_is_found_in_one_frame_and_has_no_motion():
    stills = [clip(seed, seed)[:1] for seed in range(30)]
    late = clip(300, 300)
    late[5] = stills[0][0]
    made = [late, *(clip(200 + seed, 300 + seed) for seed in range(29))]
    found = judge_clips(made, stills, roles(30, dict(enumerate(range(30)))))
    assert (found.content.marks == COPY)[0].tolist() == [True] + [False] * 29
    assert not (found.motion.marks == COPY).any()
    assert found.ordinary.max() == 0


def test_frames_are_compared_whenever_they_stand():
    first = small([clip(0, 0)])
    backwards = [first[0].flip(0)]
    assert frame_distances(backwards, first).item() == pytest.approx(0)
    assert torch.cdist(motion_rows(backwards), motion_rows(first)).item() > 0.3


def test_length_and_size_of_a_clip_matter_little():
    first = clip(0, 0)
    long = torch.nn.functional.interpolate(first.transpose(0, 1)[None], (33, 64, 64),
                                           mode="trilinear", align_corners=True)  # fmt: skip
    both = small([first, long[0].transpose(0, 1)])
    assert [tuple(each.shape) for each in both] == [(9, 3, 32, 32), (33, 3, 32, 32)]
    other = torch.cdist(motion_rows(both)[:1], motion_rows(small([clip(1, 1)]))).item()
    assert torch.cdist(*motion_rows(both)[:, None]).item() < 0.4 * other


def test_ordinary_motions_begin_with_rest_and_keep_their_middle():
    still = ground(3)
    moved = ordinary_motions(still)
    assert moved.shape == (1 + 3 * 12, FRAMES, 3, SIDE, SIDE)
    torch.testing.assert_close(moved[0], still.expand(FRAMES, -1, -1, -1))
    assert (motion_rows(moved[1:]).norm(dim=1) - 1).abs().max() < 1e-5
    right = moved[1][-1, :, 10, 10] - still[:, 10, 10 + round(0.06 * SIDE / 2)]
    assert right.abs().max() < 0.05


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[frame 3 height width\]"):
        small([torch.zeros(3, 8, 8)])
    with pytest.raises(ValueError, match="a frame at least"):
        small([torch.zeros(0, 3, 8, 8)])
