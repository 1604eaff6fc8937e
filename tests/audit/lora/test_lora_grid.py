"""The table of similarities against a plain search through the matrix."""

from dataclasses import replace

import numpy as np
import pytest
from some_audit import NEAR, VERBATIM, make_audit
from unmemorize.audit.lora import grid as module
from unmemorize.audit.lora.grid import load_marks, load_matrix, make_grid
from unmemorize.shared.drawing.heatmap import LEVELS


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    return make_audit(tmp_path_factory.mktemp("grid"), images=5, reproduced=2, epochs=False)


@pytest.fixture(scope="module")
def grid(audit):
    return make_grid(audit, load_matrix(audit), load_marks(audit))


def test_columns_stand_in_pairs_and_the_attack_alone(grid):
    titles = [(column.title, column.lora) for column in grid.columns]
    named = ("own caption", "own, reworded", "other captions", "trigger word", "no words")
    assert titles == [(name, on) for name in named for on in (True, False)] + [("attack", True)]


def test_every_cell_is_the_nearest_of_its_column(audit, grid):
    matrix = load_matrix(audit)
    wanted = {
        "own caption": lambda g, n: g.asked == "caption" and g.source == n,
        "own, reworded": lambda g, n: g.asked == "paraphrase" and g.source == n,
        "other captions": lambda g, n: g.asked in ("caption", "paraphrase") and g.source != n,
        "trigger word": lambda g, n: g.asked == "trigger",
        "no words": lambda g, n: g.asked == "empty",
        "attack": lambda g, n: g.asked == "attack",
    }
    seen = 0
    for row in (*grid.rows, *grid.held_out):
        for column, cell in zip(grid.columns, row.cells, strict=True):
            values = [
                matrix[number, row.image]
                for number, made in enumerate(audit.generations)
                if made.lora == column.lora and wanted[column.title](made, row.image)
            ]
            assert (cell is None) == (not values)
            if cell:
                seen += 1
                assert cell.similarity == pytest.approx(max(values))
                assert matrix[cell.generation, row.image] == pytest.approx(cell.similarity)
    assert seen == len(grid.rows) * 11 + len(grid.held_out) * 7  # held-out ones have no caption


def test_twins_differ_in_nothing_but_the_lora(audit, grid):
    twins = 0
    for row in grid.rows:
        for column, cell in zip(grid.columns, row.cells, strict=True):
            made = audit.generations[cell.generation]
            assert (cell.twin is None) == (column.title == "attack")
            if cell.twin is not None:
                twin = audit.generations[cell.twin]
                assert twin.lora != made.lora
                assert (twin.prompt, twin.seed, twin.asked) == (made.prompt, made.seed, made.asked)
                twins += 1
    assert twins


def test_rows_are_gravest_first_and_held_out_ones_apart(audit, grid):
    assert [row.verdict.verdict for row in grid.rows] == ["verbatim"] * 2 + ["none"] * 3
    similarities = [row.verdict.similarity for row in grid.rows]
    assert similarities[:2] == sorted(similarities[:2], reverse=True)
    assert [row.image for row in grid.held_out]
    assert all(audit.training.images[row.image].held_out for row in grid.held_out)


def test_colour_grows_from_the_controls_and_marks_from_the_thresholds(grid):
    off = [
        cell.similarity for row in (*grid.rows, *grid.held_out)
        for column, cell in zip(grid.columns, row.cells, strict=True) if cell and not column.lora
    ]  # fmt: skip
    assert grid.ground == pytest.approx(np.median(off))
    cells = [cell for row in grid.rows for cell in row.cells]
    for one in cells:
        assert one.level == 0 or one.similarity > grid.ground
        assert one.mark == (
            "verbatim" if one.similarity > VERBATIM else "near" if one.similarity > NEAR else ""
        )
    by_similarity = sorted(cells, key=lambda cell: cell.similarity)
    levels = [cell.level for cell in by_similarity]
    assert levels == sorted(levels)
    assert LEVELS >= levels[-1] > LEVELS / 2


def test_long_lists_are_cut_where_the_weakest_stand(audit, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 3)
    monkeypatch.setattr(module, "HELD_OUT_ROWS", 1)
    cut = make_grid(audit, load_matrix(audit), load_marks(audit))
    assert [row.verdict.verdict for row in cut.rows] == ["verbatim", "verbatim", "none"]
    assert len(cut.held_out) == 1


def test_a_matrix_of_another_audit_is_refused(audit):
    fewer = replace(audit, generations=audit.generations[1:])
    with pytest.raises(ValueError, match=r"similarity\.npz has shape"):
        load_matrix(fewer)
