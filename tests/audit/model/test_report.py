import base64
import dataclasses
import hashlib
import re

import pytest
from fake_result import HOSTILE, make_result
from page_reader import Reader
from unmemorize.audit.model.report import render_report
from unmemorize.audit.model.result import NearPrompt


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return make_result(tmp_path_factory.mktemp("audit"), steps=2)


@pytest.fixture(scope="module")
def page(result):
    return render_report(result, result.folder)


@pytest.fixture(scope="module")
def read(page):
    return Reader(page)


def with_summary(result, **change):
    return dataclasses.replace(result, summary=result.summary | change)


def test_says_what_was_found_in_order(read, result):
    found = [
        "6 of 40 prompts look memorized",
        "duplicates were planted",
        "How certain is this?",
        "150 ordinary prompts",
        f"{result.calibration.judge.threshold:.5g}",
        "Clopper-Pearson",
        "What this means, and what it does not",
        "evidence, not proof",
        "Scores against the controls",
        "Flagged prompts",
        "without “",
        "For comparison",
        "All prompts",
        "ab" * 32,
        "How to get this page again",
        "unmemorize audit --steps 2",
    ]
    places = [read.text.find(text) for text in found]
    assert min(places) >= 0, found[places.index(-1)]
    assert places == sorted(places)


def test_never_calls_anything_safe(result, tmp_path):
    for hits in (0, 1, 6):
        some = make_result(tmp_path, hits=hits, demo=False)
        text = Reader(render_report(some, tmp_path)).text.lower()
        assert not re.search(r"\b(safe|harmless model|no memorization|proves)\b", text)
        assert "planted" not in text
        assert "can still bring a training image back" in text


def test_nothing_found_still_makes_a_page(tmp_path):
    result = make_result(tmp_path, hits=0)
    text = Reader(render_report(result, tmp_path)).text
    assert "None of 40 prompts scored above the threshold" in text
    assert "no proof" in text
    assert "Flagged prompts" not in text


def test_hostile_words_add_no_element_and_no_attribute(tmp_path):
    prompts = [HOSTILE + str(i) for i in range(12)]
    calm = make_result(tmp_path, [f"calm-{i}" for i in range(12)], text="calm", near=1)
    evil = make_result(tmp_path, prompts, text=HOSTILE, near=1)
    pages = [Reader(render_report(r, tmp_path)) for r in (calm, evil)]
    # The hostile prompt folds or is cut into more words; everything else is the same.
    kinds = [{(tag, *sorted(a)) for tag, a in page.elements} for page in pages]
    allowed = {("details",), ("summary",), ("span", "class"), ("span", "class", "title")}
    assert kinds[1] - kinds[0] <= allowed
    assert pages[1].tags.count("script") == pages[1].tags.count("style") == 1
    assert pages[0].raw == pages[1].raw
    assert all(not name.startswith("on") for page in pages for _, a in page.elements for name in a)
    assert "alert(1)" in pages[1].text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", pages[1].text)
    assert "{{7*7}}" in pages[1].text


def test_hostile_page_is_well_formed(tmp_path):
    prompts = ["\ud800 lone", "مرحبا \u202e", "写真 🦊", "a\nb\tc", "x" * 5000, HOSTILE] + ["p"] * 8
    result = make_result(tmp_path, prompts, text=HOSTILE)
    read = Reader(render_report(result, tmp_path))
    assert read.open == []
    assert "<U+D800> lone" in read.text
    assert "a␊b␉c" in read.text


def test_needs_no_network(page, read):
    for tag, attributes in read.elements:
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            value = attributes.get(name, "")
            assert value.startswith(("data:image/", "#")) or not value, (tag, name, value[:40])
        assert tag not in ("link", "iframe", "object", "embed", "form", "base")
    assert not re.search(
        r"https?:|@import|url\(|fetch\(|XMLHttp|WebSocket", page.replace("xmlns", "")
    )


def test_policy_allows_its_own_script_and_style_and_nothing_else(read):
    head = read.elements[:8]
    policy = next(a["content"] for _, a in head if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for name in ("style", "script"):
        digest = hashlib.sha256(read.raw[name].encode()).digest()
        assert rules[f"{name}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert not any("style" in attributes for _, attributes in read.elements)
    before = read.tags[: read.tags.index("style")]
    assert "script" not in before


def test_same_input_same_bytes(page, result):
    assert render_report(result, result.folder) == page
    assert "seconds" not in page


def test_pictures_are_embedded_beside_their_neighbours(page, result, read):
    pictures = [a for tag, a in read.elements if tag == "img"]
    # Charts say how wide they are.
    webp = [a for a in pictures if a["src"].startswith("data:image/webp") and "width" not in a]
    # In this result all images of a prompt share one neighbour.
    redrawn = sum(len(e.explanation.redrawn) for e in result.entries if e.explanation)
    count = sum(len(e.images) + bool(e.images) + bool(e.map) for e in result.entries) + redrawn
    assert len(webp) == count
    assert all(a["alt"] for a in pictures)
    data = base64.b64decode(webp[0]["src"].split(",")[1])
    assert data[:4] == b"RIFF"


def test_missing_and_damaged_pictures_are_said_so(tmp_path):
    result = make_result(tmp_path, hits=2)
    first, second = (tmp_path / e.images[0].path for e in result.entries[:2])
    first.unlink()
    second.write_bytes(b"not a picture")
    assert Reader(render_report(result, tmp_path)).text.count("image not found") == 2


def test_pictures_outside_the_folder_are_not_embedded(tmp_path):
    result = make_result(tmp_path / "audit", hits=2)
    (tmp_path / "audit" / result.entries[0].map).rename(tmp_path / "private.png")
    for name in ("../private.png", str(tmp_path / "private.png")):
        entry = dataclasses.replace(result.entries[0], map=name)
        some = dataclasses.replace(result, entries=(entry, *result.entries[1:]))
        read = Reader(render_report(some, tmp_path / "audit"))
        assert read.text.count("image not found") == 1


def test_rows_are_sorted_and_can_be_sorted(page, result, read):
    scores = [float(v) for v in re.findall(r'<td class="n" data-value="([\d.e-]+)">', page)][::2]
    assert scores == sorted((e.score for e in result.entries), reverse=True)
    heads = [a for tag, a in read.elements if tag == "th" and a.get("aria-sort")]
    assert [a["aria-sort"] for a in heads] == ["descending"]
    assert page.count('data-flagged="1"') == len(result.flagged)


def test_without_script_the_table_is_a_plain_table(read):
    tools = next(a for _, a in read.elements if a.get("id") == "tools")
    assert "hidden" in tools
    assert "button" not in read.tags


def test_long_prompts_fold(tmp_path):
    result = make_result(tmp_path, ["word " * 10_000, *["p"] * 9], hits=1, demo=False)
    read = Reader(render_report(result, tmp_path))
    assert "10000 words" in read.text
    coloured = read.tags.index("span", read.tags.index("article"))
    assert "details" in read.tags[read.tags.index("article") : coloured], "the card is endless"
    huge = make_result(tmp_path, ["x" * 300_000, *["p"] * 9], hits=0)
    page = render_report(huge, tmp_path)
    assert "200000 more characters" in page


def test_words_are_coloured_by_significance(page, result):
    known = result.flagged[0].explanation
    top = known.words[max(range(len(known.words)), key=known.significance.__getitem__)]
    assert f'<span class="w20" title="{top}: ' in page
    assert ".heatmap .w20{background:#" in page


def test_plot_exists_for_phone_and_desk_light_and_dark(read):
    media = [a["media"] for tag, a in read.elements if tag == "source"]
    assert [("dark" in m, "max-width" in m) for m in media[:3]] == [
        (True, True), (False, True), (True, False)
    ]  # fmt: skip


def test_caveats_and_warnings_stand_before_the_numbers(result):
    warnings = [f"warning {i}" for i in range(9)]
    some = with_summary(result, caveats=["made on another model"], warnings=warnings)
    text = Reader(render_report(some, result.folder)).text
    assert text.index("made on another model") < text.index("Expected by chance")
    assert "5 more notes" in text
    assert all(line in text for line in warnings)


def test_unknown_similarity_is_not_counted(result):
    similarity = result.summary["similarity"] | {"threshold": None, "copies": None}
    text = Reader(render_report(with_summary(result, similarity=similarity), result.folder)).text
    assert "not counted" in text
    assert "came out as copies" not in text
    none = Reader(render_report(with_summary(result, similarity=None), result.folder)).text
    assert "Copies among" not in none


def test_near_prompts_stand_under_their_member_with_the_words_that_differ(tmp_path):
    prompts = [
        "a red fox on green grass", "a castle", "<b>a red hen</b> on green grass",
        *(f"thing number {i}" for i in range(12)),
    ]  # fmt: skip
    page = render_report(make_result(tmp_path, prompts, hits=3, near=1), tmp_path)
    read = Reader(page)
    for sentence in (
        "2 of 15 prompts look memorized, 1 more is near a memorized one",
        "1 flagged prompt shares its words with one that scores higher or was copied",
        "Near a memorized one. Of the flagged prompts, 1 (6.7\u00a0% of all",
        "those near a memorized one under it",
    ):
        assert sentence in read.text
    cards = page.split('<article class="card')[1:]
    assert [re.search(r'aria-label="Prompt (\d+)"', card)[1] for card in cards[:3]] == [
        "0", "2", "1"
    ]  # fmt: skip
    assert [card.startswith(" near") for card in cards[:3]] == [False, True, False]
    # Markup in a prompt stays text, and the words of both are told apart.
    assert (
        "<del>a</del> <ins>&lt;b&gt;a</ins> red <del>fox</del> <ins>hen&lt;/b&gt;</ins> "
        "on green grass" in cards[1]
    )
    assert "beside prompt 0, above: 75\u00a0% of the words, cosine 0.88" in cards[1]
    assert page.count('data-flagged="1"') == 3  # it is still flagged
    assert page.count('<span class="tag">near a memorized one</span>') == 2  # card and table
    assert "<del>" not in cards[0]


def test_the_copied_prompt_stands_above_a_near_one_with_a_higher_score(tmp_path):
    result = make_result(tmp_path, hits=3)
    first, second, third = result.flagged
    near = NearPrompt(index=third.index, prompt=third.prompt, overlap=0.75, cosine=0.875)
    entries = tuple(
        dataclasses.replace(e, near=near) if e.index == first.index else e for e in result.entries
    )
    result = dataclasses.replace(result, entries=entries)
    assert [e.index for e in result.flagged] == [first.index, second.index, third.index]
    assert [e.index for e in result.families] == [second.index, third.index, first.index]


def test_endless_prompts_that_differ_are_shortened(tmp_path):
    member = " ".join(f"word{i}" for i in range(4000))
    near = " ".join(f"word{i if i % 40 else 'x'}" for i in range(4000))
    result = make_result(tmp_path, [member, near, *["p"] * 9], hits=2, near=1, demo=False)
    card = render_report(result, tmp_path).split('<article class="card near"')[1]
    shown = card[: card.index("</p>")]
    assert "<del>word0</del> <ins>wordx</ins> word1 word2" in shown
    assert "…" in shown
    assert len(shown) < 4000


def test_groups_say_how_many_of_their_hits_are_near(tmp_path):
    groups = ["verbatim", "learnt", "held_out", *["learnt"] * 12]
    result = make_result(tmp_path, [f"p {i}" for i in range(15)], hits=3, near=2, groups=groups)
    text = Reader(render_report(result, tmp_path)).text
    assert "1 of 13, near a memorized one" in text
    assert "1 of 1, near a memorized one" in text
    assert result.summary["groups"]["verbatim"]["near"] == 0
