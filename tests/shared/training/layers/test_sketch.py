"""Frequent Directions: the bounds of the theorem, whatever the rows and however they come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_text import seeded
from unmemorize.shared.training.layers.activations import Sketch


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16), width=st.integers(1, 30), count=st.integers(0, 200),
    size=st.integers(1, 12), decay=st.sampled_from([0.3, 0.8, 1.0]), batch=st.integers(1, 50),
)  # fmt: skip
def test_no_direction_loses_more_than_the_theorem_allows(seed, width, count, size, decay, batch):
    scale = decay ** torch.arange(width, dtype=torch.float64)
    rows = seeded(count, width, seed=seed) * scale @ torch.linalg.qr(seeded(width, width)).Q
    sketch = Sketch(width, size)
    for block in rows.split(batch):
        sketch.add(block)
    kept = sketch.rows
    assert len(kept) < 2 * size
    lost = torch.linalg.eigvalsh(rows.T @ rows - kept.T @ kept)
    rounding = 1e-9 * (1 + sketch.energy)
    assert -rounding < lost.min()
    assert lost.max() <= sketch.error + rounding
    tails = (torch.linalg.svdvals(rows) ** 2).flip(0).cumsum(0).flip(0)
    for k in range(size):
        tail = float(tails[k]) if k < len(tails) else 0.0
        assert sketch.error <= tail / (size - k) + rounding
    assert sketch.energy == pytest.approx(float(rows.square().sum()))


def test_what_comes_late_and_little_by_little_is_not_lost():
    """Where the smallest are only cut off, each block of the third direction would be."""
    early, late = torch.eye(3, dtype=torch.float64)[:2], torch.zeros(2, 3, dtype=torch.float64)
    late[:, 2] = 0.6
    sketch = Sketch(3, 2)
    sketch.add(early)
    for _ in range(100):
        sketch.add(late)
    assert sketch.error <= 2  # |A - A_1|^2 / (2 - 1)
    assert sketch.rows[:, 2].square().sum() >= 72 - 2


def test_rows_of_low_rank_are_kept_exactly():
    rows = seeded(500, 3) @ seeded(3, 40)
    sketch = Sketch(40, 8)
    sketch.add(rows)
    torch.testing.assert_close(sketch.rows.T @ sketch.rows, rows.T @ rows)
    assert len(sketch.rows) < 16
    assert sketch.error < 1e-9 * sketch.energy


def test_a_sketch_refuses_no_rows_at_all():
    with pytest.raises(ValueError, match="`size`"):
        Sketch(4, 0)


@pytest.mark.parametrize("count", [3, 60])
def test_rows_about_a_centre_are_those_of_the_differences(count):
    rows, centre = 4 + seeded(count, 5) @ seeded(5, 30), seeded(30, seed=9)
    sketch = Sketch(30, 32)
    sketch.add(rows)
    about = sketch.about(centre)
    torch.testing.assert_close(about.T @ about, (rows - centre).T @ (rows - centre))
