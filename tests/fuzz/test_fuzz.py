"""Thousands of mutated inputs of every kind: read rightly, or refused by one clear line."""

import pytest
from fuzzing import Tally, fuzz
from kinds import KINDS, Kind

COUNT = 150
"""Inputs of a kind; `make fuzz` reads a thousand and more."""


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_no_mutated_input_is_read_wrongly_or_ends_in_a_librarys_error(kind, tmp_path):
    tally = fuzz(kind, range(COUNT), tmp_path)
    assert tally.other == []
    assert tally.clear > 0 or kind.name.startswith(("prompts_txt", "image_bmp", "image_gif"))


def test_the_oracle_sees_wrong_values_and_foreign_errors(tmp_path):
    """The check can fail: a reader that takes anything, and one that raises as its library does."""
    import json

    write = lambda path: path.write_text(json.dumps({"a": [1, 2, 3], "b": "text"}), "utf-8")  # noqa: E731
    anything = Kind("any", "a.json", write, lambda path: path.read_bytes(), (ValueError,))
    bare = Kind("bare", "b.json", write, lambda path: json.loads(path.read_bytes()), ())
    faults: list[Tally] = [fuzz(kind, range(50), tmp_path) for kind in (anything, bare)]
    assert len(faults[0].other) == 50
    assert "read as another value" in faults[0].other[0][1]
    assert any("JSONDecodeError" in fault for _, fault in faults[1].other)
