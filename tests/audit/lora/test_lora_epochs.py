"""Saved epochs: their order, and the last one that does no more than controls."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from unmemorize.audit.lora.judge import best_epoch, judge_epoch
from unmemorize.audit.lora.read import Epoch, read_epochs
from unmemorize.audit.lora.result import ImageVerdict
from unmemorize.audit.lora.rule import COPY, NEAR


def write(path, header=None):
    save_file({"x": torch.zeros(1)}, path, header)
    return path


def test_epochs_are_ordered_by_header_then_name(tmp_path):
    write(tmp_path / "my-000002.safetensors")
    write(tmp_path / "my-000010.safetensors")
    write(tmp_path / "other.safetensors", {"ss_epoch": "4"})
    final = write(tmp_path / "my.safetensors")
    found = read_epochs([tmp_path, final])  # named twice, read once
    assert [(epoch.path.name, epoch.number) for epoch in found] == [
        ("my-000002.safetensors", 2),
        ("other.safetensors", 4),
        ("my-000010.safetensors", 10),
        ("my.safetensors", 11),
    ]


def test_an_absent_file_and_an_empty_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(ValueError, match=r"--epochs: .* no \.safetensors file and no folder"):
            read_epochs([path])


def points(levels: list[tuple[int, int]], of_base: int = 0, near_before: int = 0):
    """Return points of epochs in which so many of 20 images are near, and so many verbatim.

    The base model draws the first `of_base` of them, and the first `near_before` are near without.
    """
    verdicts = [
        ImageVerdict(
            image=image, verdict="base" if image < of_base else "none", similarity=0.2,
            control=0.2, ceiling=1.0, generation=0, attracted=0, closeness=None, closeness_off=None,
        )
        for image in range(20)
    ]  # fmt: skip
    made = []
    for near, copies in levels:
        marks = torch.zeros(20)
        marks[:near], marks[:copies] = NEAR, COPY
        epoch = Epoch(path=Path("my.safetensors"), number=len(made), sha256="")
        before = [image < near_before for image in range(20)]
        score = 0.1 * len(made)
        best = torch.full((20,), 0.2)
        made.append(judge_epoch(epoch, best, marks, verdicts, before, score))
    return made


@pytest.mark.parametrize(
    ("levels", "inside", "best"),
    [
        ([(0, 0), (2, 0), (9, 0), (20, 20)], [True, True, False, False], 1),
        ([(0, 0), (1, 1), (0, 0)], [True, False, True], 0),  # luck does not undo a copy
        ([(20, 20)], [False], None),
        ([(0, 0), (1, 0)], [True, True], 1),
        ([], [], None),
    ],
)
def test_the_last_epoch_before_any_that_is_outside(levels, inside, best):
    made = points(levels)
    assert [point.inside for point in made] == inside
    assert best_epoch(made) == best
    assert [point.reproduced.count for point in made] == [copies for _, copies in levels]


def test_what_the_base_model_draws_or_comes_near_to_puts_no_epoch_outside():
    (drawn,) = points([(3, 3)], of_base=3, near_before=3)
    assert drawn.inside
    assert drawn.reproduced.count == 0
    (alike,) = points([(9, 0)], near_before=9)
    assert alike.inside
    (nearer,) = points([(9, 0)])
    assert not nearer.inside
