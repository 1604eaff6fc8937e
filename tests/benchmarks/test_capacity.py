"""The capacity of a LoRA: what counts as a copy, and when an arm has come to its end."""

import pytest
import torch
from capacity import BACK, CAPTIONS, capacity, copied, wordings

SIZES = (2, 4, 8)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({}, None),
        ({2: 0.95}, None),
        ({2: 0.5}, 0),
        ({2: BACK, 4: 0.89}, 2),
        ({2: 1.0, 4: 1.0, 8: 0.95}, 8),
        ({2: 0.5, 4: 1.0}, 0),  # a set that is not given back ends the arm
    ],
)
def test_the_capacity_is_the_largest_set_before_the_first_that_is_not_given_back(shares, expected):
    assert capacity(shares, SIZES) == expected


def test_a_copy_is_three_times_nearer_to_its_image_than_to_any_other():
    images = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 90.0]])
    made = torch.tensor([[2.2, 0.0], [2.3, 0.0], [9.0, 0.0], [4.5, 0.0]])
    assert copied(made, images).tolist() == [True, False, True, False]


def test_the_arms_differ_in_captions_alone():
    assert [len(wordings(arm, "a cat")) for arm in CAPTIONS] == [1, 1, 4]
    assert wordings("one", "a cat") == wordings("one", "a dog")
    assert all("a cat" in text for text in wordings("several", "a cat"))
    assert len(set(wordings("several", "a cat"))) == 4
