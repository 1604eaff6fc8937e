"""The split of what the text adds to a clip: theorems in float64, and a plain loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unmemorize.shared.score.clips import ClipNorms, clip_norms

shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 4))
seeds = st.integers(0, 2**16)
drawn = settings(max_examples=40, deadline=None)


def seeded(shape, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, shape[-1], generator=generator, dtype=dtype)


@drawn
@given(shape=shapes, seed=seeds)
def test_squares_add_up(shape, seed):
    d = seeded(shape, seed)
    total = d.flatten(1).square().sum(1)
    norms = clip_norms(d)
    torch.testing.assert_close(norms.content.square() + norms.motion.square(), total)
    torch.testing.assert_close(norms.frames.square().sum(1), total)


@drawn
@given(shape=shapes, seed=seeds)
def test_the_order_of_frames_moves_neither_content_nor_motion(shape, seed):
    d = seeded(shape, seed)
    order = torch.randperm(shape[2], generator=torch.Generator().manual_seed(seed))
    norms, other = clip_norms(d), clip_norms(d[:, :, order])
    torch.testing.assert_close(other.content, norms.content)
    torch.testing.assert_close(other.motion, norms.motion)
    torch.testing.assert_close(other.frames, norms.frames[:, order])


@drawn
@given(shape=shapes, seed=seeds, frames=st.integers(2, 6))
def test_what_all_frames_share_is_content_alone(shape, seed, frames):
    still = seeded(shape, seed)[:, :, :1].expand(-1, -1, frames, -1, -1)
    norms, moving = clip_norms(still), seeded((*shape[:2], frames, shape[3]), seed + 1)
    torch.testing.assert_close(norms.motion, torch.zeros_like(norms.motion), rtol=0, atol=1e-12)
    torch.testing.assert_close(norms.content, still.flatten(1).norm(dim=1))
    # A still that is added to any clip leaves its motion, however strong it is.
    together = clip_norms(moving + 100 * still)
    torch.testing.assert_close(together.motion, clip_norms(moving).motion, rtol=1e-9, atol=1e-9)


def test_what_cancels_over_time_is_motion_alone():
    d = seeded((2, 3, 2, 4))
    d = torch.cat([d[:, :, :1], -d[:, :, :1]], dim=2)
    norms = clip_norms(d)
    torch.testing.assert_close(norms.content, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(norms.motion, d.flatten(1).norm(dim=1))
    assert norms.motion.min() > 1


def test_a_clip_is_measured_as_a_loop_would_and_by_itself():
    d = seeded((3, 2, 4, 3))
    norms = clip_norms(d)
    for row in range(3):
        mean = sum(d[row, :, frame] for frame in range(4)) / 4
        rest = sum((d[row, :, frame] - mean).square().sum() for frame in range(4))
        assert norms.content[row] == pytest.approx((4 * mean.square().sum()).sqrt().item())
        assert norms.motion[row] == pytest.approx(rest.sqrt().item())
        assert norms.frames[row, 2] == pytest.approx(d[row, :, 2].norm().item())
    alone = clip_norms(d[1:2])
    torch.testing.assert_close(alone.motion[0], norms.motion[1])


def test_small_motion_keeps_its_digits_beside_large_content():
    still = torch.full((1, 4, 8, 16, 16), 3.0)
    moved = still.clone()
    moved[0, 0, :, 0, 0] += 1e-3 * torch.tensor([1.0, -1.0] * 4)
    assert clip_norms(moved).motion.item() == pytest.approx(1e-3 * 8**0.5, rel=1e-3)


def test_packing_keeps_every_part():
    norms = clip_norms(seeded((3, 2, 4, 3)))
    packed = norms.packed()
    assert packed.shape == (3, 6)
    for part, again in zip(norms, ClipNorms.unpacked(packed), strict=True):
        assert torch.equal(part, again)
