"""The page's text and structure: what it says, what it escapes, what it does not show."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from page_reader import Reader
from PIL import Image
from some_audit import HOSTILE, HOSTILE_NAME, make_audit
from unmemorize.audit.lora.page import render_lora_page
from unmemorize.audit.lora.page_images import BLURRED, LARGE, Thumbnails
from unmemorize.shared.files.images import read_image


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    return make_audit(tmp_path_factory.mktemp("page"), images=5, reproduced=3, held_out=1)


@pytest.fixture(scope="module")
def page(audit):
    return render_lora_page(audit, include_images=True)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """An audit without a curve, which takes most of a page's time."""
    folder = tmp_path_factory.mktemp("short")
    return make_audit(folder, images=3, reproduced=1, held_out=1, epochs=False)


def test_says_what_was_found_in_order(page, audit):
    text = Reader(page).text
    found = [
        "3 of 5 training images come back, against 0 of 40 controls",
        "probability 0.00040",
        "How certain is this?",
        "Above all 40 controls of this run: the LoRA off",
        "The demo model was asked for 5 planted duplicates; 5 came back.",
        "An image that did not come back was not shown to be absent",
        "First: duplicates in the training folder",
        "Side by side",
        "Every training image, every kind of prompt",
        "Held out: not trained on",
        "Which epoch to publish",
        "Guidance from the base model to the LoRA",
        "What was found to cause it, and what to do",
        "take 1 file out: 4 images remain",
        "--mem_filter q0.95",
        "How hard the words pull",
        "The LoRA and what its file says",
        audit.lora.sha256,
        "Settings and versions",
        "How to get this page again",
        "unmemorize audit model --lora mine.safetensors",
        "unmemorize verify FOLDER-OF-THE-REPORT",
    ]
    places = [text.find(each) for each in found]
    assert min(places) >= 0, found[places.index(-1)]
    assert places == sorted(places)


def test_never_calls_anything_safe(short, tmp_path):
    clean = make_audit(tmp_path, images=3, reproduced=0, held_out=1, epochs=False)
    for some in (short, clean, replace(clean, attack=None, words=(), duplicates=(), scores=())):
        text = Reader(render_lora_page(some, include_images=True)).text.lower()
        assert not re.search(r"\b(safe|no memorization|proves|guarantee\w*)\b", text)
        assert "can still bring it out" in text
    assert "what was found to cause it" not in text


def test_a_refused_headline_gives_no_verdict(tmp_path):
    refused = make_audit(tmp_path, images=3, reproduced=1, held_out=1, given=False, epochs=False)
    text = Reader(render_lora_page(refused, include_images=True)).text
    assert "No headline: what was counted cannot carry one" in text
    assert "4 controls cannot carry a threshold: 20 are needed." in text
    assert "probability" not in text
    assert "Thresholds. None." in text


def test_a_failed_instrument_is_told_before_everything(short):
    control = replace(short.positive_control, works=False, detail="Found 0 of 5.")
    text = Reader(render_lora_page(replace(short, positive_control=control),
                                   include_images=True)).text  # fmt: skip
    assert "The instrument failed its own test. Found 0 of 5." in text
    assert text.index("failed its own test") < text.index("Come back verbatim")


def test_hostile_words_add_no_element_and_no_attribute(short, tmp_path):
    calm = make_audit(tmp_path / "calm", images=3, reproduced=1, epochs=False, text="calm")
    evil = make_audit(
        tmp_path / "evil", images=3, reproduced=1, epochs=False, text=HOSTILE, name=HOSTILE_NAME
    )
    pages = [Reader(render_lora_page(a, include_images=True)) for a in (calm, evil)]
    kinds = [{(tag, *sorted(a)) for tag, a in page.elements} for page in pages]
    # A hostile caption has more words, each with its colour.
    assert kinds[1] - kinds[0] <= {("span", "class", "title")}
    tags = [page.tags for page in pages]
    assert tags[1].count("script") == tags[1].count("style") == 1
    assert pages[0].raw == pages[1].raw
    assert not any(name.startswith("on") for _, a in pages[1].elements for name in a)
    assert "alert(1)" in pages[1].text
    assert "alert(3)" in pages[1].text  # the file's name
    assert "{{7*7}}" in pages[1].text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", pages[1].text)


def test_nothing_is_loaded_from_elsewhere_and_ids_are_unique(page):
    elements = Reader(page).elements
    for _, attributes in elements:
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for _, a in elements if "href" in a}
    assert targets <= set(ids)
    assert len([name for name in targets if name.startswith("made-")]) > 10


def test_the_same_audit_gives_the_same_page(audit, page):
    assert render_lora_page(audit, include_images=True) == page


def test_no_folder_of_this_machine_is_named(page, audit):
    assert str(audit.folder.parent) not in page
    assert "training, kohya layout" in page


def pixels(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)


def from_few(path, size) -> np.ndarray:
    """Return what `BLURRED` pixels of a square picture say about the rest."""
    few = read_image(path).resize((BLURRED, BLURRED), Image.Resampling.BOX)
    return np.asarray(few.resize(size, Image.Resampling.BICUBIC), dtype=float)


def test_blurred_means_that_the_pixels_are_gone(audit):
    """A blurred thumbnail holds what 8 x 8 pixels tell, not more: no filter can bring it back."""
    path = audit.training.folder / audit.training.images[0].name
    shown = pixels(Thumbnails(audit, include_images=True).training(0, 128))
    blurred = pixels(Thumbnails(audit, include_images=False).training(0, 128))
    original = np.asarray(read_image(path), dtype=float)
    few = from_few(path, (128, 128))
    assert np.abs(shown - original).mean() < 4  # webp
    assert np.abs(blurred - few).mean() < 4
    assert np.abs(blurred - original).mean() > 15


def test_copies_are_blurred_with_what_they_copy(audit):
    plain, full = (Thumbnails(audit, include_images=some) for some in (False, True))
    for number, made in enumerate(audit.generations):
        assert plain.blurs(number) == bool(made.mark)
        assert not full.blurs(number)
    assert {made.mark for made in audit.generations} == {"verbatim", "near", ""}
    unknown = replace(audit, thresholds=replace(audit.thresholds, enough=False))
    assert all(
        Thumbnails(unknown, include_images=False).blurs(n) for n in range(len(audit.generations))
    )


def test_without_leave_no_sharp_training_image_is_in_the_page(short):
    """Every embedded picture is compared with every training image, in all sizes."""

    def sharpest(page: str, image: int) -> float:
        path = short.training.folder / short.training.images[image].name
        found = []
        for uri in set(re.findall(r'"(data:image/webp;base64,[^"]+)"', page)):
            picture = pixels(uri)
            size = picture.shape[1], picture.shape[0]
            original = np.asarray(read_image(path).resize(size, Image.Resampling.LANCZOS), float)
            found.append(np.abs(picture - original).mean())
        return min(found)

    shared = render_lora_page(short, include_images=False)
    private = render_lora_page(short, include_images=True)
    assert "their detail is not hidden but gone" not in private
    for index in range(len(short.training.images)):
        assert sharpest(private, index) < 5
        assert sharpest(shared, index) > 8


def test_missing_pictures_leave_a_gap_and_no_error(short, tmp_path):
    gone = replace(short, training=replace(short.training, folder=tmp_path / "moved"))
    text = Reader(render_lora_page(gone, include_images=True)).text
    assert text.count("image not found") >= len(short.training.images)


def test_pictures_are_no_larger_than_they_are_shown(short):
    page = render_lora_page(short, include_images=True)
    for uri in set(re.findall(r'"(data:image/webp;base64,[^"]+)"', page)):
        assert max(pixels(uri).shape) <= LARGE
