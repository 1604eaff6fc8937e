"""By what generated images are compared, and what that finds."""

import pytest
from needs import need_sscd
from PIL import Image, ImageEnhance, ImageOps
from unmemorize import demo
from unmemorize.audit.common.measure import silent
from unmemorize.audit.model import comparison
from unmemorize.audit.model.comparison import Comparer, best_features, known_images
from unmemorize.shared.copies.features import PIXELS
from unmemorize.shared.files.images import ImageFiles
from unmemorize.shared.files.prompts import PromptSet


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Training images as a user has them, with their captions."""
    folder, captions = tmp_path_factory.mktemp("training"), []
    for caption in demo.captions():
        if caption.group == "verbatim":
            demo.training_image(caption.text).save(folder / f"{len(captions)}.png")
            captions.append(caption.text)
    paths = [folder / f"{number}.png" for number in range(len(captions))]
    return captions, paths


@pytest.fixture
def known(files):
    captions, paths = files
    prompts = PromptSet(
        prompts=tuple(captions), sources=(("folder",),) * len(captions),
        images=tuple((path,) for path in paths), read=len(captions), empty=0,
    )  # fmt: skip
    return known_images("models/mine", prompts, silent)


def edited(image):
    """Return a crop of an image, off its middle, mirrored and brighter."""
    image = ImageOps.mirror(image).crop((24, 4, 124, 104)).resize((128, 128))
    return ImageEnhance.Brightness(image).enhance(1.2)


def found(comparer, files, tmp_path):
    """Return the share of edited copies whose original is found."""
    captions, paths = files
    for number, path in enumerate(paths):
        edited(Image.open(path)).save(tmp_path / f"edited{number}.png")
    pairs = [(caption, f"edited{number}.png") for number, caption in enumerate(captions)]
    nearest = comparer.nearest(pairs, comparer.judge(pairs))
    return sum(image.is_own for image in nearest.values()) / len(nearest)


def test_edited_copies_of_files_are_found_by_sscd(known, files, tmp_path):
    need_sscd()
    comparer = Comparer(known, tmp_path)
    assert comparer.features.name.startswith("SSCD")
    by_pixels = Comparer(known, tmp_path, features=PIXELS)
    assert found(comparer, files, tmp_path) > 0.9
    assert found(by_pixels, files, tmp_path) < 0.6
    ImageFiles(files[1])[0].save(tmp_path / "exact.png")
    pairs = [("", "exact.png"), ("", "edited0.png")]
    judged = comparer.judge(pairs)
    assert judged.limit is None  # too few other prompts to say what a copy is
    exact, changed = comparer.nearest(pairs, judged).values()
    assert exact.copied is None
    assert exact.similarity == pytest.approx(1, abs=1e-5)
    assert 0.3 < changed.similarity < 0.99


def test_pixels_serve_where_sscd_is_missing_and_for_the_demo(known, monkeypatch):
    nobody = PromptSet(prompts=(), sources=(), images=(), read=0, empty=0)
    assert best_features(known_images(demo.NAME, nobody, silent)) is PIXELS
    monkeypatch.setattr(comparison, "has_sscd", lambda: False)
    assert best_features(known) is PIXELS


def test_files_are_opened_one_by_one(files):
    pictures = ImageFiles(files[1])
    assert len(pictures) == len(files[1])
    assert pictures[1].size == (128, 128)
    assert pictures[1].mode == "RGB"
