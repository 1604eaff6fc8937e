"""Edits change the words they name, and keep the rest as typed."""

import pytest
from unmemorize.shared.words.edits import Edit, apply, move_parts, parse_edits
from unmemorize.shared.words.leaving_out import without_word


def edit(kind: str, index: int, word: str, to: str = "") -> Edit:
    return Edit(kind=kind, indices=(index,), words=(word,), to=to)


@pytest.mark.parametrize(
    ("prompt", "edits", "expected"),
    [
        ("a red  cat", [edit("replace", 1, "red", "dim")], "a dim  cat"),
        ("cats cat", [edit("replace", 1, "cat", "dog")], "cats dog"),
        ("(cat:1.2)\tb", [edit("replace", 0, "(cat:1.2)", r"\1 g")], "(\\1 g:1.2)\tb"),
        ("the cat\u2019s hat", [edit("replace", 1, "cat\u2019s", "thing")], "the thing hat"),
        ("a — b", [edit("replace", 1, "—", "x")], "a x b"),
        ("кот, снег", [edit("replace", 0, "кот,", "вещь")], "вещь, снег"),
        ("a red cat", [edit("reorder", 1, "red", "end")], "a cat red"),
        ("a red cat ", [edit("reorder", 1, "red", "end")], "a cat red"),
        ("a b c d", [edit("drop", 3, "d"), edit("drop", 0, "a")], "b c"),
        ("a b c d", [edit("reorder", 0, "a", "end"), edit("replace", 2, "c", "xyz")], "b xyz d a"),
        ("a b c d", [edit("reorder", 2, "c", "end"), edit("reorder", 0, "a", "end")], "b d a c"),
        ("a b", [edit("drop", 0, "a"), edit("reorder", 1, "b", "end")], "b"),
    ],
)
def test_edits_keep_the_rest_as_typed(prompt, edits, expected):
    assert apply(prompt, prompt.split(), edits) == expected


def test_dropping_is_what_the_explanation_does():
    prompt = "(a:1.2)  b,\tc\nd "
    for index, word in enumerate(prompt.split()):
        expected = without_word(prompt, prompt.split(), index)
        assert apply(prompt, prompt.split(), [edit("drop", index, word)]) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat, flat,  white ground",
         {"flat, white ground,  a cat": "move “a cat,” to the end",
          "white ground, a cat,  flat": "move “white ground” to the start"}),
        ("a cat,flat", {"flat,a cat": "move “cat,flat” to the start"}),
        ("one, two three four,", {"two three four, one,": "move “one,” to the end"}),
        ("a cat", {}),
        (", , ", {}),
        ("(a cat, flat:1.2), white", {}),
        ("(a), b", {"b, (a)": "move “(a),” to the end"}),
    ],
)  # fmt: skip
def test_parts_move_round_and_commas_stay(prompt, expected):
    plans = move_parts(prompt, prompt.split())
    assert {text: str(edits[0]) for edits, text in plans} == expected
    sizes = [len(edits[0].indices) for edits, _ in plans]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("cat -> dog", "a dog, a dog"), ("cat", "a a"), ("CAT ->", "a a"),
        ("\n  \n", "a Cat, a cat"),
        ("cat, -> big dog\n a ", "big dog, cat"),  # the comma names the first alone
        ("a -> the\ncat->dog", "the dog, the dog"), ("cat -> ", "a a"),
    ],
)  # fmt: skip
def test_typed_edits_strike_and_replace(typed, expected):
    prompt = "a Cat, a cat"
    assert apply(prompt, prompt.split(), parse_edits(typed, prompt.split())) == expected


@pytest.mark.parametrize(
    ("typed", "message"),
    [("dog -> cat", "No word of the prompt is 'dog'. Its words: a cat,"),
     ("-> cat", "No word of the prompt is ''"),
     ("cat -> dog\ncat,", "Two edits change the word 'cat,'")],
)  # fmt: skip
def test_typed_edits_that_fit_no_word_are_refused(typed, message):
    with pytest.raises(ValueError, match=message):
        parse_edits(typed, ["a", "cat,"])
