"""The truth about the demo: groups, renderings, sheets."""

import hashlib
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from unmemorize import demo
from unmemorize.demo import data


class PlainArt(data.Art):
    """Drawings that need no package: noise that tells subject and vendor apart."""

    def __init__(self):
        super().__init__(Path())

    def _drawing(self, hexcode: str, vendor: str) -> Image.Image:
        rng = np.random.default_rng([int(hexcode.split("-")[0], 16), data.VENDORS.index(vendor)])
        return Image.fromarray(rng.integers(0, 256, (40, 60, 4), dtype=np.uint8))


def test_groups_have_the_promised_sizes_and_no_caption_twice():
    captions = demo.captions()
    counts = Counter(c.group for c in captions)
    assert counts["verbatim"] >= 48
    assert counts["template"] >= 24
    assert counts["learnt"] >= 240
    assert counts["held_out"] >= 100
    assert len({c.text for c in captions}) == len(captions)
    assert len({c.hexcode for c in captions}) == len(captions)


def test_controls_are_held_out_or_learnt_and_not_audited():
    controls, audited = set(demo.controls()), demo.audited()
    groups = Counter(c.group for c in demo.captions() if c.text in controls)
    assert set(groups) == {"held_out", "learnt"}
    assert groups["held_out"] >= 99  # what a 1 % false-positive rate needs
    assert not controls & {c.text for c in audited}
    others = Counter(c.group for c in audited)
    assert all(others[group] >= 100 for group in groups)
    # Of one mix: as many of both on either side, but for the captions near a repeated one.
    assert groups["learnt"] == others["learnt"]
    assert 0 <= others["held_out"] - groups["held_out"] < 20


def test_only_what_a_group_repeats_is_repeated():
    captions = list(demo.captions())
    per_caption = Counter(r.caption for r in data.build_renderings(captions))
    expected = {"verbatim": 1, "template": 3, "learnt": data.RENDERINGS, "held_out": 0}
    assert all(per_caption[i] == expected[c.group] for i, c in enumerate(captions))
    trained = {(r.vendor, r.seed) for r in data.build_renderings(captions)}
    assert not trained & {(r.vendor, r.seed) for r in data.build_controls(captions)}


def test_renderings_of_a_layout_share_everything_but_the_object():
    captions = [c for c in demo.captions() if c.layout == data.LAYOUTS[0]][:3]
    renderings = data.build_renderings(captions)
    images = np.stack([np.array(i) for i in data.render_all(PlainArt(), captions, renderings)])
    differs = (images != images[0]).any((0, 3))
    rows, columns = np.nonzero(differs)
    assert differs.any()
    assert np.ptp(rows) <= 62
    assert np.ptp(columns) <= 62


def test_a_rendering_is_a_function_of_its_seed():
    caption = next(c for c in demo.captions() if c.group == "learnt")
    first, again, other = (
        np.array(data.render(PlainArt(), caption, data.Rendering(0, "noto", seed)))
        for seed in (5, 5, 6)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_sheets_give_back_what_was_put_in(tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (11, 1, 1, 3), dtype=np.uint8)
    images = [Image.fromarray(np.broadcast_to(c, (16, 16, 3)).copy()) for c in colours]
    data.save_sheet(tmp_path / "sheet.webp", images, 16, quality=95)
    back = data.cut_sheet(tmp_path / "sheet.webp", 16, len(images))
    errors = [
        np.abs(np.array(a, int) - np.array(b, int)).mean()
        for a, b in zip(images, back, strict=True)
    ]
    assert max(errors) < 8  # lossy, and colours are kept at half resolution
    assert np.abs(np.array(images[0], int) - np.array(back[1], int)).mean() > 20


def test_committed_sheets_belong_to_the_captions():
    renderings = data.build_renderings(list(demo.captions()))
    thumbnails = demo.training_images()
    assert len(thumbnails) == len(renderings)
    for index in (0, 30, 60):  # among those that are repeated
        caption = demo.captions()[renderings[index].caption]
        if renderings[index].vendor == "fluent":
            full = demo.training_image(caption.text).resize((32, 32), Image.Resampling.BOX)
            error = np.abs(np.array(full, int) - np.array(thumbnails[index], int)).mean()
            assert error < 12, caption
    assert demo.training_image("no caption of ours") is None


def test_a_package_with_other_bytes_is_refused(tmp_path):
    name = next(iter(data.PACKAGES))
    tarball = tmp_path / f"{name.strip('@').replace('/', '-')}-{data.PACKAGES[name][0]}.tgz"
    with tarfile.open(tarball, "w:gz"):
        pass
    sha256 = hashlib.sha256(tarball.read_bytes()).hexdigest()
    with pytest.raises(RuntimeError, match=sha256):
        data.fetch(tmp_path)


def test_without_npm_the_error_says_what_to_get(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"npm.*Install Node\.js, or put .*\.tgz"):
        data.fetch(tmp_path)
