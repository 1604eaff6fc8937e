"""The reader of JSON: what it takes, and that it says file, key, found and expected."""

import json
import os
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from unmemorize.shared.files.schema import Count, Reader, Within, digest_of

READER = Reader(ValueError, "a test", "Type it again.")


@dataclass(frozen=True, kw_only=True)
class Inner:
    rows: list[tuple[Count, float]]
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner | None
    names: dict[str, str]
    share: Annotated[float, Within(0.0, 1.0)] = 0.5


GOOD = {"inner": {"rows": [[1, 2], [3, 4.5]]}, "names": {"x": "y"}}


def test_objects_become_dataclasses_and_numbers_floats():
    read = READER.check(GOOD, Outer, "f.json")
    assert read == Outer(inner=Inner(rows=[(1, 2.0), (3, 4.5)]), names={"x": "y"})
    assert READER.check(GOOD | {"inner": None}, Outer, "f.json").inner is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inner": {"rows": [[1, "x"]]}}, r'`inner.rows\[0\]\[1\]` is "x", expected a finite'),
        ({"inner": {"rows": [[True, 1]]}}, r"`inner.rows\[0\]\[0\]` is true, expected a whole num"),
        ({"inner": {"rows": [[-1, 1]]}}, "is -1, expected a whole number of at least 0"),
        ({"inner": {"rows": [[1]]}}, r"is \[1\], expected a list of 2: a whole number"),
        ({"inner": {"rows": [], "kind": "c"}}, r"`inner.kind` is \"c\", expected one of 'a', 'b'"),
        ({"share": 1.5}, "`share` is 1.5, expected a finite number from 0 to 1"),
        ({"share": 10**400}, "`share` is 1000"),
        ({"names": {"x": 1}}, "`names.x` is 1, expected text"),
        ({"more": 1}, r"has unknown fields \['more'\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_key_found_and_expected(change, says):
    with pytest.raises(ValueError, match=says) as told:
        READER.check(GOOD | change, Outer, "f.json")
    assert str(told.value).startswith("f.json does not fit: ")
    assert str(told.value).endswith(" Type it again.")


def test_a_missing_field_and_further_fields_of_other_programs():
    with pytest.raises(ValueError, match=r"the whole lacks the fields \['names'\]"):
        READER.check({"inner": None}, Outer, "f.json")
    assert READER.check(GOOD | {"more": 1}, Outer, "f.json", foreign=True).share == 0.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1, "a": 2}', "a key occurs twice"),
        (b'{"a": NaN}', "NaN is no finite number"),
        (b'{"a": 1e999}', "1e999 is no finite number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"", "Expecting value"),
    ],
)
def test_what_readers_disagree_about_is_no_json(text, says, tmp_path):
    path = tmp_path / "f.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=says) as told:
        READER.parse_file(path)
    assert f"{path} is not a test" in str(told.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "f.json")
    with pytest.raises(ValueError, match="no regular file"):
        READER.parse_file(tmp_path / "f.json")


def test_a_digest_is_of_the_content_whatever_its_layout():
    content = {"b": [1, 2.5], "a": "é"}
    sealed = content | {"digest": digest_of(content, "digest")}
    again = json.loads(json.dumps(dict(reversed(sealed.items())), indent=3))
    assert digest_of(again, "digest") == again["digest"]
    assert digest_of(again | {"a": "e"}, "digest") != again["digest"]
