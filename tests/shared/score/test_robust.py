"""The centre and scale of a sample: against a slow reference, and what outliers do to them."""

import pytest
import torch
from unmemorize.shared.score.robust import median_and_deviation


@pytest.mark.parametrize("count", [1, 2, 9, 10])
def test_each_column_has_its_own_median_and_deviation(count):
    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    median, deviation = median_and_deviation(values)
    for column in range(3):
        own = sorted(values[:, column].tolist())
        middle = own[(count - 1) // 2]  # the lower of two
        apart = sorted(abs(value - middle) for value in own)
        assert median[column].item() == middle
        assert deviation[column].item() == apart[(count - 1) // 2]


def test_one_column_gives_two_numbers():
    median, deviation = median_and_deviation(torch.tensor([1.0, 2.0, 4.0]))
    assert (median.item(), deviation.item()) == (2.0, 1.0)


def test_outliers_do_not_move_them():
    values = torch.arange(9.0)
    moved = values.clone()
    moved[-1] = 1e9
    assert median_and_deviation(values) == median_and_deviation(moved)


def test_values_that_are_alike_have_the_least_deviation():
    assert median_and_deviation(torch.ones(5), 1e-3)[1].item() == pytest.approx(1e-3)
    assert median_and_deviation(torch.ones(5))[1].item() == 0
