"""The page of what works where: read as it was written, and never silently worse."""

from matrix import WORKS, page, read_page, worse

ROWS = {
    "one": {"detect": WORKS, "guard: reword": "refused: no / there: 3. reasons", "observe": WORKS},
    "two": {"detect": "fails: KeyError: 'x'", "guard: reword": WORKS, "observe": WORKS},
}


def test_a_page_is_read_as_it_was_written():
    assert read_page(page(ROWS)) == ROWS


def test_what_got_worse_is_named():
    before = {"detect": WORKS, "guard: reword": "refused: a", "observe": "fails: b"}
    assert worse(before, before) == []
    found = {"detect": "refused: c", "guard: reword": "fails: d", "observe": WORKS}
    assert worse(found, before) == ["detect: refused: c", "guard: reword: fails: d"]
    assert worse({"detect": WORKS, "guard: reword": "refused: other"}, before) == []
