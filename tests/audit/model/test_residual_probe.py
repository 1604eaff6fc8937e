"""The residual probe brings a memorized image back, and not its mirror image."""

import dataclasses

import pytest
from PIL import Image, ImageOps
from unmemorize import demo
from unmemorize.audit.common.measure import silent
from unmemorize.audit.model import residual_probe
from unmemorize.audit.model.comparison import Comparer, known_images
from unmemorize.audit.model.config import AuditConfig
from unmemorize.audit.model.images import PROMPTS
from unmemorize.audit.model.residual_probe import probe_prompt
from unmemorize.shared.files.prompts import PromptSet


@pytest.fixture(scope="module")
def known():
    return known_images(
        demo.NAME, PromptSet(prompts=(), sources=(), images=(), read=0, empty=0), silent
    )


@pytest.fixture(scope="module")
def memorized():
    return next(c.text for c in demo.captions() if c.group == "verbatim")


def others(folder):
    """Renderings that were never trained on, in place of other prompts' generations."""
    pairs = []
    for number, image in enumerate(demo.control_images()[:PROMPTS]):
        image.save(folder / f"other-{number}.png")
        pairs.append((f"other {number}", f"other-{number}.png"))
    return pairs


@pytest.mark.slow
def test_a_memorized_image_comes_back_without_its_prompt(denoiser, known, memorized, tmp_path):
    comparer = Comparer(known, tmp_path)
    config = AuditConfig(generation_steps=20)
    probed = probe_prompt(denoiser, comparer, config, memorized, (0, 1, 2), "x", others(tmp_path))
    assert sum(probed.training.copied) >= 2
    assert sum(probed.mirror.copied) <= 1
    assert probed.training.loss_after < 0.8 * probed.training.loss_before
    for path in (*probed.training.images, *probed.mirror.images):
        with Image.open(tmp_path / path) as picture:
            assert picture.size == (128, 128)


def quick(monkeypatch):
    slow = residual_probe.residual_probe
    monkeypatch.setattr(
        residual_probe, "residual_probe", lambda *a, **k: slow(*a, **k | {"iterations": 1})
    )


def test_a_symmetric_image_is_no_control_for_itself(
    denoiser, known, memorized, tmp_path, monkeypatch
):
    quick(monkeypatch)
    image = demo.training_image(memorized)
    half = image.crop((0, 0, 64, 128))
    image.paste(ImageOps.mirror(half), (64, 0))
    small = [*known.thumbnails, image.resize((32, 32), Image.Resampling.BOX)]
    image.save(tmp_path / "symmetric.png")
    symmetric = dataclasses.replace(
        known, thumbnails=small, captions=[*known.captions, "symmetric"],
        paths=[*known.paths, tmp_path / "symmetric.png"],
    )  # fmt: skip
    comparer, config = Comparer(symmetric, tmp_path), AuditConfig(generation_steps=1)
    pairs = others(tmp_path)
    probed = probe_prompt(denoiser, comparer, config, "symmetric", (0,), "x", pairs)
    assert probed.mirror is None
    assert probe_prompt(denoiser, comparer, config, "unknown", (0,), "x", pairs) is None


def test_without_other_prompts_nothing_is_called_a_copy(
    denoiser, known, memorized, tmp_path, monkeypatch
):
    quick(monkeypatch)
    comparer, config = Comparer(known, tmp_path), AuditConfig(generation_steps=1)
    probed = probe_prompt(denoiser, comparer, config, memorized, (0,), "x", [])
    assert probed.training.copied == (None,)
    assert probed.mirror is None
