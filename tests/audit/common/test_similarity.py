"""Similarity to training images, against a slow reference."""

import numpy as np
import pytest
from PIL import Image
from unmemorize.audit.common.similarity import ALPHA, NEIGHBOURS, SIDE, Reference, calibrate_ratio


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(c).resize((64, 64)) for c in coarse]


def noisy(image: Image.Image, scale: float) -> Image.Image:
    rng = np.random.default_rng(1)
    pixels = np.array(image) + rng.normal(0, scale, (64, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_nearest_matches_a_loop():
    training, asked = pictures(80), [noisy(pictures(80)[7], 20), *pictures(3, seed=5)]
    pixels = [np.array(i.resize((SIDE, SIDE), Image.Resampling.BOX)) / 255 for i in training]
    for image, found in zip(asked, Reference(training).nearest(asked), strict=True):
        small = np.array(image.resize((SIDE, SIDE), Image.Resampling.BOX)) / 255
        distances = [np.sqrt(((small - p) ** 2).sum()) for p in pixels]
        order = np.argsort(distances)
        assert found.index == order[0]
        rms = np.sqrt(((small - pixels[order[0]]) ** 2).mean())
        assert 1 - found.similarity == pytest.approx(rms, rel=1e-4)
        among = np.mean([distances[i] for i in order[:NEIGHBOURS]])
        assert found.ratio == pytest.approx(distances[order[0]] / (ALPHA * among), rel=1e-4)


def test_a_copy_stands_out_and_another_picture_does_not():
    reference = Reference(pictures(80))
    copy, other = reference.nearest([noisy(pictures(80)[7], 20), pictures(1, seed=9)[0]])
    assert copy.index == 7
    assert copy.ratio < 0.3
    assert other.ratio > 1


def test_a_picture_near_to_many_is_no_copy_of_one():
    many = [noisy(pictures(1)[0], s) for s in np.linspace(10, 12, 60)]
    assert Reference([*many, *pictures(20, seed=3)]).nearest([pictures(1)[0]])[0].ratio > 1


def test_threshold_is_passed_by_the_promised_share_of_controls():
    reference, controls = Reference(pictures(80)), pictures(200, seed=2)
    threshold = calibrate_ratio(reference, controls, 0.05)
    below = sum(n.ratio < threshold for n in reference.nearest(controls))
    assert below == int(0.05 * 201) - 1
    with pytest.raises(ValueError, match="99 are needed"):
        calibrate_ratio(reference, controls[:50], 0.01)
