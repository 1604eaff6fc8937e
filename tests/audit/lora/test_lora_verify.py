"""A report that was edited, or is about other files, is told apart; a hostile one does no harm."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
from some_audit import make_audit
from typer.testing import CliRunner
from unmemorize.audit.common.subject import Subject
from unmemorize.audit.lora.document import DIGEST, file_sha256
from unmemorize.audit.lora.tell import tell
from unmemorize.audit.lora.verify import ReportError, parse, verify_report
from unmemorize.cli import app
from unmemorize.shared.files.schema import digest_of


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Folder with a report (`out`), its training folder and its LoRA."""
    folder = tmp_path_factory.mktemp("verify")
    lora = folder / "mine.safetensors"
    lora.write_bytes(b"not really weights")
    audit = make_audit(folder, images=3, reproduced=1, held_out=1, epochs=False)
    tell(replace(audit, lora=replace(audit.lora, sha256=file_sha256(lora))))
    return folder


@pytest.fixture
def case(original, tmp_path):
    """A copy of all of it, free to be spoilt."""
    return shutil.copytree(original, tmp_path / "case")


def check(case, **options):
    """Return what does not fit, by name, when everything is compared."""
    given = {"lora": case / "mine.safetensors", "images": case / "training"} | options
    checks = verify_report(case / "out", **given)
    return {one.what: one.detail for one in checks if not one.fits}


def document(case):
    return json.loads((case / "out" / "audit.json").read_text("utf-8"))


def write(case, content):
    """Write another audit.json, and its digest into the card, as a forger would."""
    card = case / "out" / "model_card.md"
    text = card.read_text("utf-8").replace(document(case)["digest"], content["digest"])
    card.write_text(text, encoding="utf-8")
    (case / "out" / "audit.json").write_text(json.dumps(content), encoding="utf-8")


def flip(path, place):
    """Change one bit of one byte, counted from the end when negative."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_what_was_not_touched_fits(case):
    assert check(case) == {}
    checks = verify_report(case / "out" / "audit.json", digest=document(case)["digest"].upper())
    assert [one.what for one in checks] == [
        "audit.json", "published digest", "page, badge, card, images"
    ]  # fmt: skip
    assert all(one.fits for one in checks)


@pytest.mark.parametrize(
    "name", ["report.html", "badge.svg", "similarity.npz", "images/0003.png", "model_card.md"]
)
@pytest.mark.parametrize("place", [0, 500, -1])
def test_one_byte_of_any_file_is_noticed(case, name, place):
    flip(case / "out" / name, place)
    found = check(case)
    assert set(found) == {"page, badge, card, images"}
    assert f"1 file was edited: {name}" in found["page, badge, card, images"]


def test_one_byte_of_the_json_is_noticed_wherever_it_means_something(case):
    path = case / "audit.json"  # alone: the other files are compared elsewhere
    data = (case / "out" / "audit.json").read_bytes()
    meant = 0
    for place in range(0, len(data), max(len(data) // 300, 1)):
        spoilt = bytearray(data)
        spoilt[place] ^= 1
        path.write_bytes(spoilt)
        try:
            same = json.loads(bytes(spoilt)) == json.loads(data)
        except ValueError:
            same = False
        try:
            fits = verify_report(path)[0].fits
        except ReportError:  # the byte was one of the title or the version
            fits = False
        assert fits == same, place
        meant += not same
    assert meant > 200


def test_a_new_layout_is_no_edit(case):
    write(case, dict(reversed(document(case).items())))
    assert check(case) == {}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace('"given": true', '"given": false, "given": true', 1),
        lambda text: text.replace('"p_value": 0.0004', '"p_value": NaN', 1),
        lambda text: text.replace('"p_value": 0.0004', '"p_value": 1e999', 1),
        lambda text: text.replace('"p_value": 0.0004', '"p_value": ' + "[" * 10**5, 1),
        lambda text: text.replace('"p_value": 0.0004', '"p_value": ' + "9" * 10**5, 1),
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("mine", "mi\ud800ne", 1),
    ],
    ids=["repeated key", "NaN", "infinite", "deep", "huge", "torn", "empty", "list", "not UTF-8"],
)
def test_json_that_readers_disagree_about_does_not_fit(case, spoil):
    path = case / "out" / "audit.json"
    text = path.read_text("utf-8")
    spoilt = spoil(text)
    assert spoilt != text
    path.write_text(spoilt, encoding="utf-8", errors="surrogatepass")
    assert set(check(case)) == {"audit.json"}


def test_a_report_that_was_sealed_anew_is_told_by_the_published_digest_only(case):
    """What a digest without a signature cannot do, said by a test."""
    published, content = document(case)["digest"], document(case)
    content["headline"]["text"] = "Nothing came back"
    content["digest"] = digest_of(content, DIGEST)
    write(case, content)
    assert check(case) == {}
    assert "sealed anew" in check(case, digest=published)["published digest"]


def test_a_page_that_was_replaced_with_its_hash_needs_a_new_digest(case):
    (case / "out" / "report.html").write_text("all is well", encoding="utf-8")
    content = document(case)
    content["files"]["report.html"] = file_sha256(case / "out" / "report.html")
    write(case, content)
    assert set(check(case)) == {"audit.json"}


def test_another_lora_does_not_fit_and_another_name_does(case):
    other = case / "other.safetensors"
    other.write_bytes(b"other weights")
    assert "about another file, 'mine.safetensors'" in check(case, lora=other)["LoRA"]
    shutil.copy(case / "mine.safetensors", other)
    checks = {one.what: one for one in verify_report(case / "out", lora=other)}
    assert checks["LoRA"].fits
    assert "was called 'mine.safetensors' then" in checks["LoRA"].detail


def inside(case, name):
    return case / "training" / "10_zyx thing" / name


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda case: flip(inside(case, "01.png"), 200), "1 file changed: 10_zyx thing/01.png"),
        (lambda case: flip(inside(case, "01.txt"), 0), "1 file changed: 10_zyx thing/01.txt"),
        (lambda case: inside(case, "02.png").unlink(), "1 file missing: 10_zyx thing/02.png"),
        (lambda case: inside(case, "02.png").rename(inside(case, "z.png")),
         "1 file renamed: 10_zyx thing/02.png is now 10_zyx thing/z.png"),
        (lambda case: (case / "training/10_zyx thing").rename(case / "training/40_zyx thing"),
         "files renamed"),
    ],
    ids=["image", "caption", "missing", "renamed", "other repeats"],
)  # fmt: skip
def test_another_training_folder_does_not_fit(case, spoil, said):
    spoil(case)
    found = check(case)
    assert set(found) == {"training folder"}
    assert said in found["training folder"]


def test_copies_that_were_renamed_are_both_found(case):
    """The first two images have the same content."""
    for name in ("00", "01"):
        inside(case, f"{name}.png").rename(inside(case, f"new-{name}.png"))
    assert check(case)["training folder"].startswith("2 files renamed")


def test_more_images_are_told_but_no_edit(case):
    shutil.copy(inside(case, "00.png"), case / "training" / "regularisation.png")
    checks = {one.what: one for one in verify_report(case / "out", images=case / "training")}
    assert checks["training folder"].fits
    assert "1 image there is not part of the audit" in checks["training folder"].detail


def test_a_held_out_folder_that_was_not_used_does_not_fit(case):
    assert "read no such files" in check(case, held_out=case / "training")["held-out folder"]


def test_the_base_model_is_compared(case):
    assert "made on other weights, 'model'" in check(case, model="demo")["base model"]
    content = document(case)
    content["inputs"]["base"]["sha256"] = Subject("demo").fingerprint
    content["digest"] = digest_of(content, DIGEST)
    write(case, content)
    assert check(case, model="demo") == {}


def test_pictures_that_were_not_passed_on_are_told(case):
    shutil.rmtree(case / "out" / "images")
    checks = {one.what: one for one in verify_report(case / "out")}
    assert checks["page, badge, card, images"].fits
    detail = checks["page, badge, card, images"].detail
    assert "files are not here and could not be compared" in detail


def test_files_that_the_report_does_not_know_are_named(case):
    (case / "out" / "images" / "more.png").write_bytes(b"")
    checks = {one.what: one for one in verify_report(case / "out")}
    assert "does not know: images/more.png" in checks["page, badge, card, images"].detail


@pytest.mark.parametrize(
    "name",
    ["../secret.txt", "/etc/hostname", "images/../../secret.txt", "C:\\x", "..\\x", "\0", ""],
)
def test_names_in_a_report_open_nothing_outside(case, name):
    secret = case / "secret.txt"
    secret.write_text("secret", encoding="utf-8")
    content = document(case)
    for files in (content["files"], content["inputs"]["images"]):
        files[name] = file_sha256(secret)
    content["digest"] = digest_of(content, DIGEST)
    write(case, content)
    checks = {one.what: one for one in verify_report(case / "out", images=case / "training")}
    assert "1 file is not here" in checks["page, badge, card, images"].detail
    assert "1 file missing" in checks["training folder"].detail


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_the_place_of_a_file_does_not_block(case):
    (case / "out" / "badge.svg").unlink()
    os.mkfifo(case / "out" / "badge.svg")
    assert check(case) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"title": "a recipe"}, "is no audit of a LoRA"),
        ({"schema_version": 3}, "schema version 3, this program reads 2"),
        ({"files": None}, "no usable files"),
        ({"inputs": {"lora": 3}}, r"no usable inputs\.lora"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_understood_is_refused(case, change, said):
    write(case, document(case) | change)
    with pytest.raises(ReportError, match=said):
        check(case)


def test_no_report_there(tmp_path):
    with pytest.raises(ReportError, match="Give the folder that"):
        verify_report(tmp_path)


def test_the_digest_is_that_of_any_reader(case):
    """In the words of the documentation: sorted keys, no spaces, ASCII."""
    content = document(case)
    named = content.pop("digest")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == named == digest_of(content, DIGEST)
    assert parse(text) == content


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_the_command_answers_with_codes_and_says_what_a_digest_is_worth(case):
    folder = case / "out"
    good = run(folder, "--images", case / "training")
    assert good.exit_code == 0
    assert "It is no signature" in good.stdout
    flip(folder / "report.html", 100)
    bad = run(folder, "--json")
    assert bad.exit_code == 3
    answer = json.loads(bad.stdout)
    assert answer["fits"] is False
    assert [one["fits"] for one in answer["checks"]] == [True, False]
    assert "DOES NOT FIT" in run(folder).stdout
    missing = run(case)
    assert missing.exit_code == 1
    assert "There is no" in missing.stderr
    assert run(folder, "--lora", case / "nothing").exit_code == 1
    assert run().exit_code == 2
