"""What an audit of a LoRA writes: audit.json against its schema, the card, the badge."""

import dataclasses
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from some_audit import HOSTILE, HOSTILE_NAME, make_audit
from unmemorize import audit as room
from unmemorize.audit.lora import result as values
from unmemorize.audit.lora.document import NO_DIGEST, file_sha256, to_document
from unmemorize.audit.lora.tell import METRIC, render_badge, render_card, tell

SCHEMA = json.loads((Path(room.__file__).parent / "lora" / "audit.schema.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    return make_audit(tmp_path_factory.mktemp("tell"), images=4, reproduced=2, held_out=1)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return make_audit(tmp_path_factory.mktemp("hostile"), images=3, reproduced=1, text=HOSTILE,
                      name=HOSTILE_NAME, epochs=False)  # fmt: skip


@pytest.fixture(scope="module")
def written(audit):
    return {path.name: path for path in tell(audit)}


@pytest.fixture
def document(written):
    """The content of audit.json, free to be spoilt."""
    return json.loads(written["audit.json"].read_text("utf-8"))


def sealed(audit) -> dict:
    """Return the document with fields that only `tell` can fill."""
    return json.loads(json.dumps(to_document(audit) | {"files": {}, "digest": NO_DIGEST}))


def test_all_that_is_named_is_written(written, audit):
    assert set(written) == {"report.html", "badge.svg", "audit.json", "model_card.md"}
    assert all(path.parent == audit.folder and path.stat().st_size for path in written.values())


def test_writing_again_changes_no_byte(written, audit):
    before = {name: path.read_bytes() for name, path in written.items()}
    tell(audit)
    assert {name: path.read_bytes() for name, path in written.items()} == before


def test_every_file_is_answered_for(document, audit):
    names = {path.relative_to(audit.folder).as_posix() for path in audit.folder.rglob("*.*")}
    assert set(document["files"]) == names - {"audit.json"}
    for name, sha256 in document["files"].items():
        if name != "model_card.md":
            assert file_sha256(audit.folder / name) == sha256
    # The card holds the digest, so it is hashed with zeros in its place.
    card = (audit.folder / "model_card.md").read_text("utf-8")
    blank = card.replace(document["digest"], NO_DIGEST)
    assert hashlib.sha256(blank.encode()).hexdigest() == document["files"]["model_card.md"]


def test_every_input_is_hashed(document, audit):
    folder = audit.training.folder
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    inputs = document["inputs"]
    assert set(inputs["images"]) == names
    assert {name.rpartition(".")[2] for name in names} == {"png", "txt"}
    for name, sha256 in inputs["images"].items():
        assert file_sha256(folder / name) == sha256
    assert inputs["lora"]["sha256"] == audit.lora.sha256
    assert inputs["base"]["sha256"] == audit.model_fingerprint


def test_held_out_images_of_another_folder_stand_apart(audit, tmp_path):
    apart, (path, *_) = tmp_path / "other", sorted(audit.training.folder.rglob("*.png"))
    apart.mkdir()
    (apart / "x.png").write_bytes(path.read_bytes())
    (apart / "x.caption").write_text("words", encoding="utf-8")
    image = replace(audit.training.images[-1], name="x.png", held_out=True)
    training = replace(
        audit.training, images=(*audit.training.images[:-1], image), held_out_folder=apart
    )
    inputs = to_document(replace(audit, training=training))["inputs"]
    assert set(inputs["held_out"]) == {"x.png", "x.caption"}
    assert "x.png" not in inputs["images"]


def test_no_folder_of_this_machine_is_named(written, audit):
    for path in written.values():
        assert str(audit.folder.parent) not in path.read_text("utf-8")


def test_the_schema_is_a_schema_and_fits(document, hostile):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(document, SCHEMA)
    jsonschema.validate(sealed(hostile), SCHEMA)
    bare = replace(hostile, attack=None, epochs=(), words=(), causes=(), duplicates=())
    jsonschema.validate(sealed(bare), SCHEMA)


OBJECTS = {
    "training": values.TrainingSet, "training_image": values.TrainingImage,
    "duplicate_group": values.DuplicateGroup, "lora": values.LoraFacts,
    "generation": values.Generation, "prompt_score": values.PromptScore,
    "verdict": values.ImageVerdict, "clique": values.Clique, "epoch": values.EpochPoint,
    "thresholds": values.Thresholds, "positive_control": values.PositiveControl,
    "headline": values.Headline, "cause": values.Cause, "rate": values.Rate,
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), OBJECTS.items(), ids=OBJECTS)
def test_schema_names_and_describes_every_field(name, kind):
    known = SCHEMA["$defs"].get(name) or SCHEMA["properties"][name]
    names = {field.name for field in dataclasses.fields(kind)}
    assert names == set(known["properties"]) == set(known["required"])
    assert known["additionalProperties"] is False
    for field, description in known["properties"].items():
        assert description.get("description"), field


def test_schema_names_the_whole_document(document):
    assert set(document) == set(SCHEMA["properties"]) == set(SCHEMA["required"])
    fields = {field.name for field in dataclasses.fields(values.LoraAudit)} - {"folder"}
    assert fields < set(document)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (["schema_version"], 3), (["model_fingerprint"], "ab"), (["inputs", "images"], []),
        (["lora", "dialect"], "other"), (["training", "images", 0, "repeats"], 0),
        (["training", "images", 0, "size"], [1]), (["verdicts", 0, "verdict"], "safe"),
        (["verdicts", 0, "similarity"], 1.5), (["headline", "p_value"], 2),
        (["headline", "reproduced", "count"], -1), (["generations", 0, "asked"], "else"),
        (["attack"], "none"), (["settings", "seeds"], 3), (["digest"], None), (["more"], 1),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else repr(value),
)  # fmt: skip
def test_a_wrong_value_is_refused(path, wrong, document):
    *parents, last = path
    place = document
    for name in parents:
        place = place[name]
    place[last] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_the_card_is_read_by_the_hubs_library(written, audit):
    card = ModelCard.load(written["model_card.md"])
    results = card.data.eval_results
    assert card.data.model_name == "mine"
    assert [r.metric_type for r in results] == [METRIC] * 2
    assert results[0].metric_value == 2 / 4
    assert results[0].metric_args["high"] == pytest.approx(audit.headline.reproduced.high)
    assert results[1].metric_value == 0
    assert "may come back from other words, seeds or attacks" in card.text
    assert "2 of 4 training images come back, against 0 of 40 controls." in card.text
    assert "Probability of such a gap by chance: 0.00040." in card.text


def test_the_card_names_the_digest_of_the_report(written, document):
    assert document["digest"] in written["model_card.md"].read_text("utf-8")


def test_a_refused_headline_is_no_measurement(audit):
    refused = replace(audit, headline=replace(audit.headline, given=False, text="No verdict."))
    failed = replace(
        audit, positive_control=dataclasses.replace(audit.positive_control, works=False)
    )
    for some in (refused, failed):
        card = ModelCard(render_card(some, NO_DIGEST))
        assert card.data.eval_results is None
        assert "no verdict" in card.text
        assert "no verdict" in render_badge(some)
    assert "FAILED" in render_card(failed, NO_DIGEST)


def test_hostile_words_stay_words_in_the_card(hostile):
    """As a reader of Markdown takes them that lets HTML through."""
    card = render_card(hostile, NO_DIGEST)
    assert ModelCard(card).data.model_name.startswith("</style>")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", card)
    text = MarkdownIt("commonmark").render(ModelCard(card).text)
    assert set(re.findall(r"<(\w+)", text)) == {"h2", "p", "img", "code", "br"}
    assert text.count("<img") == 1
    assert text.count("alert(1)") == 2  # the headline and the base model's name


def test_the_badge_is_a_picture_with_a_name(audit, tmp_path):
    clean = make_audit(tmp_path, images=3, reproduced=0, held_out=0, epochs=False)
    for some, text in ((audit, "2 of 4 images came back"), (clean, "0 of 3 images came back")):
        svg = ElementTree.fromstring(render_badge(some))
        assert svg.get("role") == "img"
        assert svg.get("aria-label") == f"memorization audit: {text}"
        assert float(svg.get("width")) > 100
        assert len(render_badge(some)) < 1500
    assert "green" not in render_badge(clean)
    assert render_badge(clean) != render_badge(audit)
