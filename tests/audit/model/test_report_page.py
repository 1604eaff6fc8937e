"""The report in a real browser: what a reader clicks, and what a hostile prompt must not do."""

import dataclasses

import pytest
from fake_result import make_result
from unmemorize.audit.common.wording import number
from unmemorize.audit.model.report import render_report

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


@pytest.fixture
def open_report(chromium, tmp_path):
    """Function that opens a report offline and returns its page and what its console said."""
    contexts = []

    def opened(result, width=1200):
        path = tmp_path / "report.html"
        path.write_text(render_report(result, result.folder), encoding="utf-8")
        context = chromium.new_context(offline=True, viewport={"width": width, "height": 800})
        contexts.append(context)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
        page.goto(path.as_uri())
        return page, said

    yield opened
    for context in contexts:
        context.close()


def scores(page):
    """The column of scores as shown, from the top."""
    return page.evaluate("""() => {
        const table = document.getElementById("prompts");
        const column = [...table.tHead.rows[0].cells].findIndex(c => c.innerText === "Score");
        return [...table.tBodies[0].rows].map(r => Number(r.cells[column].dataset.value));
    }""")


def prompts_shown(page):
    return page.locator("#prompts tbody tr:visible").count()


def test_a_click_sorts_and_another_turns_the_order(open_report, tmp_path):
    page, said = open_report(make_result(tmp_path))
    head = page.locator("#prompts thead th").filter(has_text="Score").first
    first = scores(page)
    assert first == sorted(first, reverse=True)
    assert len(set(first)) > 1
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert scores(page) == sorted(first)
    head.get_by_role("button").click()
    assert scores(page) == first
    assert said == []


def test_typing_and_ticking_filter_the_rows(open_report, tmp_path):
    result = make_result(tmp_path)
    page, said = open_report(result)
    everything = len(result.entries)
    assert prompts_shown(page) == everything
    page.locator("#only").check()
    assert prompts_shown(page) == len(result.flagged) < everything
    page.locator("#only").uncheck()
    page.locator("#filter").fill("no prompt has these words")
    assert prompts_shown(page) == 0
    assert page.locator("#count").inner_text() == f"0 of {everything} shown"
    page.locator("#filter").fill(result.entries[0].prompt.upper())
    assert prompts_shown(page) >= 1
    assert said == []


def test_a_hostile_prompt_runs_nothing(open_report, tmp_path):
    result = make_result(tmp_path)
    entry = dataclasses.replace(result.entries[0], prompt=HOSTILE)
    result = dataclasses.replace(result, entries=(entry, *result.entries[1:]))
    page, said = open_report(result)
    assert page.title() != "taken"
    assert said == []
    assert "onerror" in page.locator("#prompts").inner_text()  # shown, not run


def test_the_policy_stops_what_escaping_would_miss(open_report, tmp_path):
    page, said = open_report(make_result(tmp_path))
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'),"
        " {textContent: 'document.title = \"taken\"'}))"
    )
    assert page.title() != "taken"
    assert any("Content Security Policy" in line for line in said)


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_no_wider_than_the_screen(open_report, tmp_path, width):
    page, _ = open_report(make_result(tmp_path), width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_word_is_struck_by_a_click_and_put_back_by_another(open_report, tmp_path):
    result = make_result(tmp_path)
    page, said = open_report(result)
    known, card = result.flagged[0].explanation, page.locator(".card").first
    status, top = card.locator(".struck"), known.redrawn[0]
    hint = "Strike a word to see the magnitude without it."
    assert status.inner_text() == hint
    words = card.locator(".heatmap button")
    assert words.count() == len(known.occlusions)
    for occlusion in known.occlusions[:2]:
        word = card.locator(f'.heatmap [data-word="{occlusion.index}"]')
        word.click()
        assert word.get_attribute("aria-pressed") == "true"
        assert f"Without “{occlusion.word}”: magnitude {number(occlusion.score_after)}" in (
            status.inner_text()
        )
        assert card.locator(".heatmap [aria-pressed=true]").count() == 1
        chosen = card.locator("figure.chosen")
        assert chosen.count() == (occlusion.index == top.index)
        if occlusion.index == top.index:
            assert "the image no longer comes back" in status.inner_text()
            assert chosen.locator("img").get_attribute("src").startswith("data:image/webp")
    word.click()
    assert word.get_attribute("aria-pressed") == "false"
    assert status.inner_text() == hint
    assert said == []
