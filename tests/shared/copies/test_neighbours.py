"""Copies of a set are found, others are called copies no more often than asked for."""

import pytest
import torch
from unmemorize.shared.copies.neighbours import IMAGES, Bounds, TrainingImages, nearest

BOUNDS = Bounds(own_factor=0.5, ratio=0.9)


def rows(count: int, seed: int, dimensions: int = 8) -> torch.Tensor:
    """Return features that lie in a few dimensions of many."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(dimensions, 64, generator=torch.Generator().manual_seed(0))
    return torch.randn(count, dimensions, generator=generator) @ plane


@pytest.mark.parametrize("count", [20, 60])
def test_ordinary_images_are_called_copies_as_rarely_as_asked_for(count):
    """Sets vary, so that the rate holds over sets: 10 of them, 100 images each."""
    sets = [TrainingImages(rows(count, seed), [""] * count) for seed in range(10)]
    copies = [
        one.copied
        for seed, known in enumerate(sets)
        for one in nearest(rows(100, 1000 + seed), known, BOUNDS, rate=0.05)
    ]
    assert 0.01 < sum(copies) / len(copies) < 0.06


def test_a_copy_is_found_in_sets_of_any_size_that_can_tell():
    for count in (IMAGES, 50):
        made = rows(count, 1)
        noise = torch.randn(count, 64, generator=torch.Generator().manual_seed(2))
        known = TrainingImages(made, [""] * count)
        found = nearest(made + 0.02 * noise, known, BOUNDS)
        assert [one.index for one in found] == [*range(count)]
        assert all(one.copied for one in found)
    few = TrainingImages(made[: IMAGES - 1], [""] * (IMAGES - 1))
    (alone,) = nearest(made[:1], few, BOUNDS)
    assert (alone.index, alone.limit, alone.copied) == (0, None, False)
    twice = TrainingImages(torch.cat([made, made[:1] + 1e-3]), [""] * 51)
    assert nearest(made[:1] + 0.02, twice, BOUNDS)[0].copied  # saved twice, it counts once
