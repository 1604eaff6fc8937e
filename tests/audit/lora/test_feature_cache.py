"""The cache of embeddings: never twice, never lost, never another image's."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from needs import need_sscd
from PIL import Image
from unmemorize.audit.common.sscd import Sscd
from unmemorize.audit.lora.feature_cache import FeatureCache
from unmemorize.shared.files.images import ImageFiles

need_sscd()


class Counting(Sscd):
    """The encoder, noting how many images it was given."""

    embedded = 0

    def embed(self, images, **kwargs):
        self.embedded += len(images)
        return super().embed(images, **kwargs)


@pytest.fixture(scope="session")
def encoder():
    return Counting()


@pytest.fixture
def counted(encoder):
    encoder.embedded = 0
    return encoder


def pictures(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        image = Image.linear_gradient("L").resize((40, 30)).rotate(8 * index)
        Image.merge("RGB", [image, image.rotate(90), image]).save(path)
    return paths


def test_rows_are_the_encoders_and_are_computed_once(tmp_path, counted):
    paths = pictures(tmp_path / "images", 5)
    expected = Sscd().embed(ImageFiles(paths))
    seen = []
    rows = FeatureCache(counted, tmp_path / "cache").rows(paths, progress=seen.append)
    assert torch.equal(rows, expected)
    assert (counted.embedded, sum(seen)) == (5, 5)
    moved = shutil.copy(paths[3], tmp_path / "elsewhere.png")
    again = FeatureCache(counted, tmp_path / "cache").rows([*paths[::-1], moved])
    assert torch.equal(again, expected[[4, 3, 2, 1, 0, 3]])
    assert counted.embedded == 5


def test_equal_files_are_embedded_once_and_changed_ones_again(tmp_path, counted):
    paths = pictures(tmp_path, 2)
    shutil.copy(paths[0], tmp_path / "copy.png")
    cache, seen = FeatureCache(counted, tmp_path / "cache"), []
    rows = cache.rows([paths[0], tmp_path / "copy.png"], progress=seen.append)
    assert torch.equal(rows[0], rows[1])
    assert (counted.embedded, sum(seen)) == (1, 2)
    shutil.copy(paths[1], paths[0])
    assert not torch.equal(cache.rows([paths[0]])[0], rows[0])
    assert counted.embedded == 2
    assert cache.rows([]).shape == (0, 512)


def test_another_encoder_has_rows_of_its_own(tmp_path, counted):
    """Shown with a copy of the weights that differs in one byte that is not read."""
    paths = pictures(tmp_path / "images", 1)
    first = FeatureCache(counted, tmp_path / "cache")
    first.rows(paths)
    other = Counting()
    other.path = tmp_path / other.path.name
    other.path.write_bytes(counted.path.read_bytes() + b"\0")
    second = FeatureCache(other, tmp_path / "cache")
    second.rows(paths)
    assert first.name != second.name
    assert other.embedded == 1


def test_a_damaged_file_is_computed_again(tmp_path, counted, caplog):
    paths = pictures(tmp_path / "images", 3)
    rows = FeatureCache(counted, tmp_path / "cache").rows(paths)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    assert torch.equal(FeatureCache(counted, tmp_path / "cache").rows(paths), rows)
    assert counted.embedded == 6
    assert file.name in caplog.text
    assert torch.equal(FeatureCache(counted, tmp_path / "cache").rows(paths), rows)
    assert counted.embedded == 6


def test_where_nothing_can_be_written_it_works_without(tmp_path, counted, caplog):
    paths = pictures(tmp_path / "images", 1)
    (tmp_path / "file").write_text("in the way")
    assert FeatureCache(counted, tmp_path / "file").rows(paths).shape == (1, 512)
    assert "not kept" in caplog.text


WORK = """\
import sys
from pathlib import Path
from unmemorize.audit.common.sscd import Sscd
from unmemorize.audit.lora import feature_cache
feature_cache.CHUNK = 2
paths = sorted(Path(sys.argv[1]).iterdir())
cache = feature_cache.FeatureCache(Sscd(), Path(sys.argv[2]))
cache.rows(paths, progress=lambda done: print(done, flush=True))
"""


def start(package_env, images, cache):
    return subprocess.Popen(
        [sys.executable, "-c", WORK, images, cache], env=package_env, stdout=subprocess.PIPE
    )


def test_a_kill_loses_what_was_not_finished_only(tmp_path, counted, package_env):
    paths, cache = pictures(tmp_path / "images", 40), tmp_path / "cache"
    process = start(package_env, tmp_path / "images", cache)
    while len(list(cache.rglob("*.safetensors"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = 2 * len(list(cache.rglob("*.safetensors")))
    rows = FeatureCache(counted, cache).rows(paths)
    assert counted.embedded == 40 - kept < 40
    assert torch.equal(rows, Sscd().embed(ImageFiles(paths)))


def test_two_processes_at_once(tmp_path, counted, package_env):
    paths, cache = pictures(tmp_path / "images", 12), tmp_path / "cache"
    both = [start(package_env, tmp_path / "images", cache) for _ in range(2)]
    for process in both:
        process.communicate()
        assert process.returncode == 0
    rows = FeatureCache(counted, cache).rows(paths)
    assert counted.embedded == 0
    assert torch.equal(rows, Sscd().embed(ImageFiles(paths)))
