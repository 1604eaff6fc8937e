"""A training folder's duplicates: what is kept, what the lists hold, and that nothing changes."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from unmemorize.audit.common.sscd import has_sscd
from unmemorize.audit.lora.duplicates import find_in_folder, write_lists
from unmemorize.audit.lora.linked import link_kept
from unmemorize.cli.common.terminal import bar
from unmemorize.shared.files.prompts import PromptError


def picture(seed: int, side: int = 96) -> Image.Image:
    """Return a smooth random picture, large enough to be cropped."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Five pictures with captions in kohya's layout, and an equal copy of the first."""
    place = tmp_path / "set" / "3_zorp toy"
    place.mkdir(parents=True)
    for number in range(5):
        picture(number).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"caption {number}", "utf-8")
    shutil.copy(place / "0.png", place / "a copy.png")
    (place / "a copy.txt").write_text("another caption", "utf-8")
    (place / "4.txt").unlink()
    return tmp_path / "set"


def contents(folder) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_equal_files_are_listed_once_and_nothing_changes(folder, tmp_path):
    before = contents(folder)
    found = find_in_folder(folder, method="hash", bars=bar)
    write_lists(found, tmp_path / "out")
    assert found.surplus == ("3_zorp toy/a copy.png",)
    assert (found.groups[0].exact, found.groups[0].captions) == (True, 2)
    assert contents(folder) == before
    kept = json.loads((tmp_path / "out" / "kept.json").read_text("utf-8"))
    # As sd-scripts trains them: the caption file, else the words of the folder's name.
    assert kept == {
        str(folder / "3_zorp toy" / f"{number}.png"): {
            "caption": "zorp toy" if number == 4 else f"caption {number}"
        }
        for number in range(5)
    }
    page = (tmp_path / "out" / "duplicates.html").read_text("utf-8")
    assert "1 of 6 images is a duplicate of others" in page
    assert page.count("data:image/webp") == 2


@pytest.mark.skipif(not has_sscd(), reason="needs the extra sscd")
def test_near_duplicates_are_found_and_the_largest_is_kept(folder, tmp_path):
    place = folder / "3_zorp toy"
    picture(1, side=48).save(place / "0 small.jpg", quality=60)
    by_hash = find_in_folder(folder, method="hash", bars=bar)
    found = find_in_folder(folder, method="sscd", bars=bar)
    assert found.surplus == ("3_zorp toy/0 small.jpg", *by_hash.surplus)
    assert {group.kept.name: group.exact for group in found.groups} == {
        "3_zorp toy/0.png": True, "3_zorp toy/1.png": False,
    }  # fmt: skip


def test_a_folder_of_different_images_has_none(tmp_path):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    found = find_in_folder(tmp_path, method="hash", bars=bar)
    assert (found.groups, found.headline) == ((), "No duplicates among 3 images")


def test_a_linked_folder_lacks_the_duplicates_alone(folder, tmp_path):
    found = find_in_folder(folder, method="hash", bars=bar)
    assert link_kept(found, tmp_path / "new") == 5
    expected = {name: digest for name, digest in contents(folder).items() if "a copy" not in name}
    assert contents(tmp_path / "new") == expected
    original, linked = (path / "3_zorp toy" / "1.txt" for path in (folder, tmp_path / "new"))
    linked.write_text("changed by a tagger", "utf-8")
    assert original.read_text("utf-8") == "caption 1"


def test_rows_of_tables_go_with_their_images(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "again.png")
    rows = [{"file_name": f"{name}.png", "text": f"a {name}"} for name in (0, 1, 2, "again")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    found = find_in_folder(folder, method="hash", bars=bar)
    link_kept(found, tmp_path / "new")
    lines = (tmp_path / "new" / "metadata.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows[:3]


def test_a_linked_folder_overwrites_nothing(folder, tmp_path):
    found = find_in_folder(folder, method="hash", bars=bar)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine", "utf-8")
    with pytest.raises(PromptError, match="is not empty"):
        link_kept(found, tmp_path / "new")
    with pytest.raises(PromptError, match="lies in the training folder"):
        link_kept(found, folder / "below")
    assert "below" not in {path.name for path in folder.iterdir()}


def test_no_folder_and_no_image_are_refused(tmp_path):
    with pytest.raises(PromptError, match="No such folder"):
        find_in_folder(tmp_path / "none", method="hash", bars=bar)
    with pytest.raises(PromptError, match="no image that can be read"):
        find_in_folder(tmp_path, method="hash", bars=bar)
