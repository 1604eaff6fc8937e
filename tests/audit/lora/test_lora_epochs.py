"""Saved epochs: their order, and the last one that does no more than controls."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from unmemorize.audit.lora.judge import best_epoch, judge_epoch
from unmemorize.audit.lora.read import Epoch, read_epochs
from unmemorize.audit.lora.result import Thresholds

LIMITS = Thresholds(verbatim=0.75, near=0.5, method="By hand.", controls=40)


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


def points(levels: list[tuple[int, int]]):
    """Return points of epochs in which so many of 20 images are near, and so many verbatim."""
    made = []
    for near, copies in levels:
        best = torch.full((20,), 0.2)
        best[:near], best[:copies] = 0.6, 0.9
        control = torch.full((20,), 0.3)
        epoch = Epoch(path=Path("my.safetensors"), number=len(made), sha256="")
        made.append(judge_epoch(epoch, best, control, LIMITS, score=0.1 * len(made)))
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
