"""`mem_warn` and `mem_stop` in real trainings by sd-scripts."""

import json
from pathlib import Path

import pytest
from checkouts import make_images
from kohya_lora import OUTSIDE, header, protect, same_tensors
from PIL import Image, ImageOps
from unmemorize.shared.training.filter.watch import VISITS

pytestmark = pytest.mark.slow
WORDS = ("sushi", "foggy", "a house", "a tram", "a bear", "a castle", "a bicycle", "a volcano")
"""A caption for each image: as many as a verdict needs."""
WATCHED = {"max_train_steps": None, "train_batch_size": 8, "save_every_n_epochs": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Eight different pictures, each shown so often in an epoch that the epoch is judged.

    An epoch of sd-scripts shows an image its repeats on average: its buckets are drawn from anew.
    """
    folder = tmp_path_factory.mktemp("watched") / f"{2 * VISITS}_set"
    make_images(folder)
    for number, word in enumerate(WORDS):
        with Image.open(folder / f"{number % 4}.png") as image:
            picture = ImageOps.mirror(image) if number >= 4 else image.copy()
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(word)
    return folder.parent


def test_a_warning_changes_no_bit_and_the_base_is_inside_its_own_interval(train, images):
    data = ("--train_data_dir", str(images))
    settings = WATCHED | {"max_train_epochs": 1, "learning_rate": 1e-6}
    plain = train("unwatched", *data, **settings)
    asked = protect("mem_warn=true")
    watched = train("watched", *asked.pop("extra"), *data, **(settings | asked))
    assert same_tensors(plain, watched)
    told = header(watched)
    assert json.loads(told.pop("unmemorize.filter"))["memorized_images"] == 0
    assert told == header(plain)
    report = json.loads(watched.with_name("lora.memorized.json").read_text("utf-8"))
    assert report["last_inside"] == "lora.safetensors"
    assert report["seen"] == 2 * VISITS * len(WORDS)


@pytest.mark.parametrize("door", ["script", "door"])
def test_a_training_outside_the_interval_ends_at_its_first_file(
    train, images, door, package_env, monkeypatch
):
    monkeypatch.setitem(package_env, OUTSIDE, "yes")
    asked = {"extra": ("--mem_stop",)} if door == "door" else protect("mem_stop=true")
    extra = *asked.pop("extra"), "--train_data_dir", str(images)
    settings = WATCHED | {"max_train_epochs": 3} | asked
    final = train(f"stopped by {door}", *extra, door=door, **settings)
    assert [path.name for path in final.parent.glob("*.safetensors")] == ["lora-000001.safetensors"]
    report = json.loads((final.parent / "lora.memorized.json").read_text("utf-8"))
    assert (report["seen"], report["last_inside"]) == (2 * VISITS * len(WORDS), None)
