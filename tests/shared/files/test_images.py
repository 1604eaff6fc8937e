"""Images are read as they are meant to be seen, or left out by name; nothing is waited for."""

import io
import os
import signal

import numpy as np
import pytest
from PIL import Image, ImageOps
from unmemorize.shared.files.images import ImageNotRead, is_turned, read_image
from unmemorize.shared.files.leftovers import without_leftovers


def drawing(seed: int = 0, size=(12, 8)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = drawing()
    stored.save(tmp_path / "a.png", exif=exif)
    stored.info["exif"] = exif.tobytes()
    turns = {3: 180, 6: 270, 8: 90}
    read = read_image(tmp_path / "a.png")
    assert is_turned(tmp_path / "a.png") == (orientation != 1)
    assert read.size == (stored.size if orientation < 5 else stored.size[::-1])
    if orientation in turns:
        expected = stored.rotate(turns[orientation], expand=True)
        assert np.array_equal(np.asarray(read), np.asarray(expected))
    if orientation == 2:
        assert np.array_equal(np.asarray(read), np.asarray(ImageOps.mirror(stored)))


def test_more_than_eight_bits_are_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    saved = {"grey.png": ramp.astype(np.uint16), "grey.tiff": ramp.astype(np.int32),
             "shares.tiff": (ramp / 65535).astype(np.float32),
             "floats.tiff": (ramp / 257).astype(np.float32)}  # fmt: skip
    for name, values in saved.items():
        Image.fromarray(values).save(tmp_path / name)
        read = np.asarray(read_image(tmp_path / name))
        assert read.shape == (16, 16, 3)
        assert np.abs(read[..., 0].astype(int) - expected).max() <= 1, name


def test_whatever_a_broken_file_raises_names_it(tmp_path):
    files = {}
    for suffix in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"):
        buffer = io.BytesIO()
        try:
            drawing(7, (90, 90)).save(buffer, suffix)
        except (KeyError, OSError):  # this Pillow cannot write it
            continue
        files |= {f"{suffix}{cut}.{suffix.lower()}": buffer.getvalue()[:cut]
                  for cut in (0, 10, 40, 60, 100, 200)}  # fmt: skip
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        try:
            assert read_image(path).mode == "RGB"  # some formats forgive
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
    assert len(files) > 20


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of Unix")
def test_named_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    signal.alarm(20)  # where it is opened, the test ends here
    try:
        with pytest.raises(ValueError, match=r"x\.png .*no regular file"):
            read_image(tmp_path / "x.png")
    finally:
        signal.alarm(0)


def test_what_trainers_and_editors_lay_beside_images_is_named(tmp_path):
    names = ["a.png", "sub/mask.png", "a-masklabel.png", "b-condlabel.png", ".hidden.png"]
    names += ["._a.png", ".ipynb_checkpoints/a-checkpoint.png", "_latent_cache/a.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        drawing().save(tmp_path / name)
    kept, told = without_leftovers([tmp_path / name for name in names], tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in kept] == ["a.png", "sub/mask.png"]
    for name in set(names) - {"a.png", "sub/mask.png"}:
        assert sum(name in sentence for sentence in told) >= 1
    assert sum("OneTrainer" in sentence for sentence in told) == 1
    inside = tmp_path / ".cache" / "set"  # hidden above the folder does not count
    inside.mkdir(parents=True)
    drawing().save(inside / "a.png")
    assert without_leftovers([inside / "a.png"], inside) == ([inside / "a.png"], [])


def test_only_what_trainers_read_is_opened(tmp_path):
    """EPS would start Ghostscript; an image of billions of pixels would fill the memory."""
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"a\.png is not a readable image"):
        read_image(path)
    Image.new("1", (12_000, 12_000)).save(path)
    with pytest.raises(ImageNotRead, match=r"12000 x 12000 pixels, at most 100,000,000"):
        read_image(path)
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(ImageNotRead, match="400000000 pixels"):
        read_image(path)
