"""The page in a real browser: what a click on the matrix shows, and what hostile words must not."""

import pytest
from some_audit import HOSTILE, HOSTILE_NAME, make_audit
from unmemorize.audit.lora.page import render_lora_page


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page as it is and a hostile one, by name."""
    folder = tmp_path_factory.mktemp("pages")
    audits = {
        "plain": make_audit(folder / "a", images=4, reproduced=2, held_out=1),
        "hostile": make_audit(folder / "b", images=3, reproduced=1, text=HOSTILE,
                              name=HOSTILE_NAME, epochs=False),
    }  # fmt: skip
    for name, audit in audits.items():
        page = render_lora_page(audit, include_images=True)
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return folder


@pytest.fixture
def open_page(chromium, pages):
    """Function that opens a page offline and returns it and what its console said."""
    contexts = []

    def opened(name, width=1200, **options):
        context = chromium.new_context(
            offline=True, viewport={"width": width, "height": 800}, **options
        )
        contexts.append(context)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
        page.goto((pages / f"{name}.html").as_uri())
        return page, said

    yield opened
    for context in contexts:
        context.close()


def test_a_click_on_a_number_shows_its_three_pictures(open_page):
    page, said = open_page("plain")
    look = page.locator("#look")
    assert not look.is_visible()
    cell = page.locator(".matrix td a").first
    number = cell.get_attribute("href").removeprefix("#made-")
    cell.click()
    assert look.is_visible()
    assert look.locator("h3").inner_text().startswith("Similarity .9")
    figures = look.locator("figure")
    captions = figures.all_inner_texts()
    assert len(captions) == 3
    assert "training image 10_zyx thing/00.png" in captions[0]
    assert "with the LoRA" in captions[1]
    assert "LoRA off" in captions[2]
    made = page.locator(f"#made-{number} img").get_attribute("src")
    assert figures.nth(1).locator("img").get_attribute("src") == made
    page.keyboard.press("Escape")
    assert not look.is_visible()
    assert said == []


def test_the_attack_has_no_twin_and_the_keyboard_works(open_page):
    page, said = open_page("plain")
    cell = page.locator(".matrix tbody tr").first.locator("td a").last
    cell.focus()
    page.keyboard.press("Enter")
    assert page.locator("#look figure").count() == 2
    page.get_by_role("button", name="Close").click()
    assert not page.locator("#look").is_visible()
    assert said == []


def test_without_scripts_a_number_leads_to_its_picture(open_page):
    page, _ = open_page("plain", java_script_enabled=False)
    cell = page.locator(".matrix td a").first
    target = cell.get_attribute("href")
    page.locator("details.shown summary").click()
    cell.click()
    assert page.url.endswith(target)
    assert page.locator(target).is_visible()


def test_hostile_words_run_nothing(open_page):
    page, said = open_page("hostile")
    page.locator(".matrix td a").first.click()
    assert "onerror" in page.locator("#look").inner_text()  # shown, not run
    assert said == []


def test_the_policy_stops_what_escaping_would_miss(open_page):
    page, said = open_page("plain")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'),"
        " {textContent: 'document.title = \"taken\"'}))"
    )
    assert page.title() != "taken"
    assert any("Content Security Policy" in line for line in said)


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_the_page_is_no_wider_than_the_screen_and_shows_all(open_page, name, width):
    page, said = open_page(name, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_can_be_read_on_every_colour(open_page, scheme):
    """Contrast of at least 4.5 between a cell's letters and its ground (WCAG AA)."""
    page, _ = open_page("plain", color_scheme=scheme)
    colours = page.evaluate("""() => [...document.querySelectorAll(".matrix td a")].map(a => [
        getComputedStyle(a).color, getComputedStyle(a.parentElement).backgroundColor])""")
    assert len(set(map(tuple, colours))) > 2
    for pair in colours:
        low, high = sorted(luminance(colour) for colour in pair)
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair


def luminance(colour: str) -> float:
    """Return the relative luminance of an opaque CSS colour."""
    assert colour.startswith("rgb(")
    channels = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
