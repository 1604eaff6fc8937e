"""Training folders as people have them: three layouts, and everything that goes wrong in them."""

import json
import os

import pytest
from needs import need_package
from PIL import Image
from unmemorize.audit.lora.header import Folder, Header
from unmemorize.audit.lora.training_set import read_training_set
from unmemorize.shared.files.prompts import PromptError


def read(folder, header=None, **options):
    return read_training_set(folder, header or Header(), **options)


def draw(folder, name, shade=0, caption=None, size=(8, 6)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, shade // 256, 7)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def table(training) -> dict[str, tuple[str, int]]:
    return {image.name: (image.caption, image.repeats) for image in training.images}


def test_kohya_folders(tmp_path):
    draw(tmp_path, "img/10_sks dog/a.png", 1, "a sks dog, grass\nsecond line", size=(5, 9))
    draw(tmp_path, "img/10_sks dog/b.png", 2)
    draw(tmp_path, "img/3_sks dog/c.webp", 3)
    (tmp_path / "img/3_sks dog/c.caption").write_text("asleep", encoding="utf-8")
    draw(tmp_path, "reg/1_dog/d.png", 4)
    draw(tmp_path, "img/10_sks dog/deeper/e.png", 5)
    draw(tmp_path, "loose.png", 6)
    training = read(tmp_path)
    assert table(training) == {
        "img/10_sks dog/a.png": ("a sks dog, grass", 10),
        "img/10_sks dog/b.png": ("sks dog", 10),
        "img/3_sks dog/c.webp": ("asleep", 3),
    }
    assert training.layout == "kohya"
    assert training.trigger == "sks"
    assert training.images[0].size == (5, 9)
    told = " ".join(training.warnings)
    assert "1 regularisation image is left out" in told
    assert "2 images are left out" in told
    assert "loose.png" in told
    assert "deeper/e.png" in told


def test_the_numbered_folder_itself(tmp_path):
    draw(tmp_path, "7_ohwx man/a.png", 1)
    training = read(tmp_path / "7_ohwx man")
    assert table(training) == {"a.png": ("ohwx man", 7)}
    assert training.trigger == "ohwx"


def test_the_header_names_regularisation_folders(tmp_path):
    draw(tmp_path, "10_sks dog/a.png", 1)
    draw(tmp_path, "1_dog/b.png", 2)
    header = Header(
        folders={"10_sks dog": Folder(repeats=10, images=1)}, regularisation=frozenset({"1_dog"})
    )
    assert len(read(tmp_path).images) == 2
    assert table(read(tmp_path, header=header)) == {"10_sks dog/a.png": ("sks dog", 10)}


def test_metadata_folders(tmp_path):
    for shade, name in enumerate(("a.png", "sub/b.png", "c.png", "d.png")):
        draw(tmp_path, name, shade)
    rows = [
        {"file_name": "a.png", "text": "a cat"},
        {"file_name": "./sub/../sub/b.png", "text": "a dog"},
        {"file_name": "a.png", "text": "a cat again"},
        {"file_name": "absent.png", "text": "nothing"},
        {"file_name": "c.png", "text": ""},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    training = read(tmp_path)
    assert table(training) == {"a.png": ("a cat", 2), "c.png": ("", 1), "sub/b.png": ("a dog", 1)}
    assert training.layout == "metadata"
    told = " ".join(training.warnings)
    assert "metadata.jsonl:4" in told
    assert "no table names them: d.png" in told
    assert "several captions, of which the first is used: a.png" in told


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_tables(tmp_path, kind):
    draw(tmp_path, "ä b.png", 1)
    if kind == "csv":
        (tmp_path / "metadata.csv").write_text("file_name,text\nä b.png,ein Hund\n", "utf-8")
    else:
        parquet = need_package("pyarrow.parquet")
        rows = need_package("pyarrow").table({"file_name": ["ä b.png"], "text": ["ein Hund"]})
        parquet.write_table(rows, tmp_path / "metadata.parquet")
    assert table(read(tmp_path)) == {"ä b.png": ("ein Hund", 1)}


def test_plain_folders(tmp_path):
    draw(tmp_path, "b.png", 1)
    draw(tmp_path, "a/z.jpg", 2, "zorp, a hill")
    draw(tmp_path, "a/y.jpg", 3, "zorp, a tree")
    training = read(tmp_path)
    captions = {"a/y.jpg": "zorp, a tree", "a/z.jpg": "zorp, a hill", "b.png": ""}
    assert table(training) == {name: (caption, 1) for name, caption in captions.items()}
    assert training.layout == "plain"
    assert training.trigger == ""
    assert [training.path_of(image).name for image in training.images] == [
        "y.jpg", "z.jpg", "b.png",
    ]  # fmt: skip
    header = Header(folders={tmp_path.name: Folder(repeats=12, images=3)})
    assert {i.repeats for i in read(tmp_path, header=header).images} == {12}


def test_the_trigger(tmp_path):
    draw(tmp_path, "10_hat woman/a.png", 1, "long hair, zorp, hat")
    draw(tmp_path, "10_hat woman/b.png", 2, "zorp, red, hat")
    draw(tmp_path, "2_cat/c.png", 3, "hat, zorp")
    folders = {"10_hat woman": Folder(repeats=10, images=2), "2_cat": Folder(repeats=2, images=1)}
    tags = {"10_hat woman": {"hat": 2, "zorp": 1}, "2_cat": {"hat": 1}, "1_cat": {"zorp": 9}}

    def trigger(**kwargs) -> str:
        return read(tmp_path, **kwargs).trigger

    assert trigger() == "zorp"
    assert trigger(trigger="named") == "named"
    assert trigger(trigger="") == ""
    counted = Header(folders=folders, tags=tags, regularisation=frozenset({"1_cat"}))
    assert trigger(header=counted) == "hat"
    assert trigger(header=Header(tags=tags)) == "zorp"  # no counts to compare with
    (tmp_path / "2_cat/c.txt").write_text("none of them", encoding="utf-8")
    training = read(tmp_path)
    assert training.trigger == "hat"
    assert "2 things: cat, hat woman. Only 'hat'" in " ".join(training.warnings)


def test_broken_files_are_named_and_left_out(tmp_path):
    whole = draw(tmp_path, "whole.png", 1, size=(64, 64)).read_bytes()
    (tmp_path / "<b>no image.png").write_bytes(b"text")
    (tmp_path / "cut.png").write_bytes(whole[:-30])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    training = read(tmp_path)
    assert list(table(training)) == ["whole.png"]
    (told,) = training.warnings
    assert told.startswith("4 files are left out, since they are not whole images: <b>no image.png")


def test_damaged_bytes_never_crash(tmp_path):
    for kind in ("png", "jpg", "webp", "gif", "bmp", "tif"):
        data = draw(tmp_path, f"whole.{kind}", 5, size=(24, 24)).read_bytes()
        for index in range(0, len(data), max(1, len(data) // 40)):
            damaged = data[:index] + bytes([data[index] ^ 0xFF]) + data[index + 1 :]
            (tmp_path / f"damaged-{index}.{kind}").write_bytes(damaged)
    training = read(tmp_path)
    assert {f"whole.{kind}" for kind in ("png", "jpg", "webp")} <= table(training).keys()
    assert "not whole images" in training.warnings[0]


def test_links_are_followed_and_loops_end(tmp_path):
    draw(tmp_path, "elsewhere/a.png", 1)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "10_zorp sign").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(folder)
    assert table(read(folder)) == {"10_zorp sign/a.png": ("zorp sign", 10)}


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_names_that_are_no_unicode(tmp_path):
    draw(tmp_path, "日本 🐶.png", 1)
    os.rename(draw(tmp_path, "b.png", 2), os.fsencode(tmp_path) + b"/\xff.png")
    training = read(tmp_path)
    assert list(table(training)) == ["日本 🐶.png"]
    assert "1 file is left out, since its name is not Unicode" in training.warnings[0]
    json.dumps(training.warnings).encode()


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(PromptError, match="No such folder"):
        read(tmp_path / "absent")
    with pytest.raises(PromptError, match="no image that can be read"):
        read(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(PromptError, match=r"not a whole image: a\.png"):
        read(tmp_path)


def test_held_out_images_come_last_and_are_never_trained_on(tmp_path):
    for shade in range(4):
        draw(tmp_path, f"z{shade}.png", shade)
    draw(tmp_path, "controls/a.png", 50)
    draw(tmp_path, "controls/copy.png", 2)
    training = read(tmp_path, held_out=tmp_path / "controls")
    assert [(image.name, image.held_out) for image in training.images] == [
        *((f"z{shade}.png", False) for shade in range(4)), ("a.png", True),
    ]  # fmt: skip
    assert training.path_of(training.images[-1]) == tmp_path / "controls/a.png"
    assert "copy.png" in training.warnings[-1]


def test_a_held_out_folder_without_new_images(tmp_path):
    draw(tmp_path, "set/a.png", 1)
    draw(tmp_path, "controls/b.png", 1)
    training = read(tmp_path / "set", held_out=tmp_path / "controls")
    assert len(training.images) == 1
    assert "no controls" in training.warnings[-1]
    assert "0 images count" in read(tmp_path / "set", reserve=0.9).warnings[-1]


def test_the_reserve_depends_on_content_alone(tmp_path):
    for shade in range(20):
        draw(tmp_path, f"one/{shade}.png", shade)
        draw(tmp_path, f"two/x/{99 - shade}.png", shade)
    sets = [read(tmp_path / name, reserve=0.25) for name in ("one", "two")]
    held = [{i.sha256 for i in training.images if i.held_out} for training in sets]
    assert held[0] == held[1]
    assert len(held[0]) == 5
    assert [image.held_out for image in sets[0].images] == [False] * 15 + [True] * 5
    assert all(sets[0].path_of(image).is_file() for image in sets[0].images)
    assert "only if they were left out" in sets[0].warnings[-1]


def test_ten_thousand_files(tmp_path):
    first = draw(tmp_path, "5_zorp sign/0.png", 1).read_bytes()
    for index in range(1, 10_000):
        (tmp_path / f"5_zorp sign/{index}.png").write_bytes(first)
    assert len(read(tmp_path).images) == 10_000


def test_images_without_a_caption_have_the_words_that_are_known(tmp_path):
    draw(tmp_path, "a.png", 1, "zorp, a tree")
    draw(tmp_path, "b.png", 2)
    bare = read(tmp_path, trigger="")
    assert table(bare) == {"a.png": ("zorp, a tree", 1), "b.png": ("", 1)}
    by_trigger = read(tmp_path, trigger="zorp")
    assert table(by_trigger)["b.png"] == ("zorp", 1)
    assert "1 image has no caption and is asked for by the trigger alone, 'zorp'" in " ".join(
        by_trigger.warnings
    )
    given = read(tmp_path, trigger="zorp", instance_prompt="a photo of zorp")
    assert table(given) == {"a.png": ("zorp, a tree", 1), "b.png": ("a photo of zorp", 1)}
    assert given.warnings == ()


def test_an_instance_prompt_that_no_image_needs_is_named(tmp_path):
    draw(tmp_path, "a.png", 1, "a tree")
    training = read(tmp_path, instance_prompt="a photo of zorp")
    assert table(training) == {"a.png": ("a tree", 1)}
    assert "The instance prompt is not used" in " ".join(training.warnings)


def test_the_trigger_that_ai_toolkit_puts_into_captions(tmp_path):
    for number in range(3):
        caption = f"[trigger] standing in place {number}\nsecond paragraph {number}\n"
        draw(tmp_path, f"{number}.png", number, caption)
    header = Header(tags={"1_p3rs0n": {"p3rs0n": 1}})
    training = read(tmp_path, header)
    assert training.trigger == "p3rs0n"
    assert [image.caption for image in training.images] == [
        f"p3rs0n standing in place {number}\nsecond paragraph {number}" for number in range(3)
    ]
    named = read(tmp_path, trigger=r"z\1orp")
    assert named.images[0].caption.startswith(r"z\1orp standing")
    with pytest.raises(PromptError, match=r"3 captions have \[trigger\].* --trigger"):
        read(tmp_path)
    other = Header(tags={"10_dog": {"p3rs0n": 1}})  # kohya's, of one image: no trigger of this kind
    with pytest.raises(PromptError, match="--trigger"):
        read(tmp_path, other)


def test_masks_turned_images_and_further_lines_are_told(tmp_path):
    draw(tmp_path, "a.png", 1, "first\n\nsecond")
    draw(tmp_path, "a-masklabel.png", 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "b.jpg", exif=exif)
    (tmp_path / "b.txt").write_text("upright\n")
    training = read(tmp_path)
    assert {image.name: (image.caption, image.size) for image in training.images} == {
        "a.png": ("first", (8, 6)), "b.jpg": ("upright", (6, 8)),
    }  # fmt: skip
    told = "\n".join(training.warnings)
    assert "1 file is left out (masks or conditions that OneTrainer lays beside images)" in told
    assert "1 image is compared upright" in told
    assert "nothing asks for: a.png." in told
