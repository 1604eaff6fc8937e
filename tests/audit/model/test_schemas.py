"""The shipped schemas fit what an audit writes, and refuse what it would never write."""

import dataclasses
import json

import jsonschema
import pytest
from fake_result import HOSTILE, make_result
from tiny_audit import lines, schema
from unmemorize.audit.common.result import dumps
from unmemorize.audit.model import result as values


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return make_result(tmp_path_factory.mktemp("audit"), steps=2, near=1)


@pytest.fixture
def line(fake) -> dict:
    """The fullest line of results.jsonl, free to be spoilt."""
    return json.loads(next(entry for entry in fake.flagged if entry.near).to_json())


@pytest.mark.parametrize("name", ["summary", "results"])
def test_the_schemas_are_schemas(name):
    jsonschema.Draft202012Validator.check_schema(schema(name))


def test_schema_fits_the_summary(fake, tmp_path):
    for some in (
        fake,
        make_result(tmp_path, hits=0, demo=False),
        make_result(tmp_path, text=HOSTILE),
    ):
        jsonschema.validate(json.loads(dumps(some.summary)), schema("summary"))


@pytest.mark.parametrize("name", ["verdict", "flagged_rate", "near_rate", "calibration", "caveats"])
def test_schema_misses_what_is_missing(fake, name):
    summary = json.loads(dumps(fake.summary))
    del summary[name]
    with pytest.raises(jsonschema.ValidationError, match=name):
        jsonschema.validate(summary, schema("summary"))


def test_schema_names_every_field_that_is_written(fake):
    known = schema("summary")["properties"]
    assert set(fake.summary) == set(known)
    for name in ("counts", "calibration", "model"):
        assert set(fake.summary[name]) == set(known[name]["properties"])


def test_every_line_of_a_real_audit_fits_its_schema(result, config):
    entries = lines(config.output)
    assert len(entries) == len(result.entries) > 0
    assert any(entry["explanation"] for entry in entries)
    assert any(entry["images"] for entry in entries)
    for entry in entries:
        jsonschema.validate(entry, schema("results"))


def test_lines_with_neighbours_and_hostile_words_fit_too(fake, tmp_path):
    hostile = make_result(tmp_path, [HOSTILE + str(i) for i in range(12)], text=HOSTILE)
    for entry in (*fake.entries, *hostile.entries):
        jsonschema.validate(json.loads(entry.to_json()), schema("results"))
    assert any(image.nearest for image in hostile.flagged[0].images)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (["schema_version"], 1), (["index"], "0"), (["prompt"], None), (["sources"], []),
        (["count"], 0), (["cut"], None), (["group"], "unheard of"), (["score"], "5.1"),
        (["score"], None), (["magnitude_per_element"], -1.0), (["trace", 0, 0], "5.1"),
        (["trace", 0, 0], -1.0), (["p_value"], 0), (["q_value"], 1.5), (["memorized"], 1),
        (["near", "index"], -1), (["near", "overlap"], 0.4), (["near", "cosine"], 1.5),
        (["near"], True),
        (["explanation", "words"], "a b"), (["explanation", "significance", 0], "1"),
        (["explanation", "method"], "paper"), (["explanation", "redrawn", 0, "outcome"], "safe"),
        (["explanation", "occlusions", 0, "score_after"], "1"), (["images"], None),
        (["images", 0, "seed"], 0.5), (["images", 0, "nearest", "similarity"], 1.5),
        (["images", 0, "nearest", "copied"], "yes"), (["map"], 3),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else repr(value),
)  # fmt: skip
def test_a_line_with_a_wrong_value_is_refused(path, wrong, line):
    jsonschema.validate(line, schema("results"))
    *parents, last = path
    place = line
    for name in parents:
        place = place[name]
    place[last] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(line, schema("results"))


def objects(line: dict) -> list[tuple[dict, type, dict]]:
    """Return every kind of object in a line, the class it is written from, and its schema."""
    known = schema("results")
    image, explanation = line["images"][0], line["explanation"]
    return [
        (line, values.AuditEntry, known),
        (explanation, values.WordSignificance, known["$defs"]["explanation"]),
        (explanation["occlusions"][0], values.OccludedWord, known["$defs"]["occlusion"]),
        (explanation["redrawn"][0], values.RedrawnImage, known["$defs"]["redrawn"]),
        (line["near"], values.NearPrompt, known["$defs"]["near"]),
        (image, values.GeneratedImage, known["$defs"]["image"]),
        (image["nearest"], values.NearestImage, known["$defs"]["nearest"]),
    ]


def test_schema_names_and_describes_every_field_of_a_line(line):
    for _, kind, known in objects(line):
        names = {field.name for field in dataclasses.fields(kind)}
        names |= {"schema_version"} if kind is values.AuditEntry else set()
        assert names == set(known["properties"]) == set(known["required"]), kind
        for name, field in known["properties"].items():
            assert field.get("description"), f"{kind.__name__}.{name}"


@pytest.mark.parametrize("number", range(7))
def test_fields_too_many_or_too_few_are_refused(number, line):
    target = objects(line)[number][0]
    for name in list(target):
        kept = target.pop(name)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(line, schema("results"))
        target[name] = kept
    jsonschema.validate(line, schema("results"))
    target["more"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(line, schema("results"))
