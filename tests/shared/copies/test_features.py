"""What images are compared by, against a slow reference."""

import numpy as np
import pytest
import torch
from PIL import Image
from unmemorize.shared.copies.features import PIXELS, SIDE


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(c).resize((64, 64)) for c in coarse]


def test_pixels_measure_the_root_mean_square_difference_of_thumbnails():
    images, done = pictures(5), []
    rows = PIXELS.rows(images, progress=done.append)
    assert sum(done) == 5
    small = [np.array(i.resize((SIDE, SIDE), Image.Resampling.BOX)) / 255 for i in images]
    for a in range(5):
        for b in range(5):
            distance = torch.linalg.vector_norm(rows[a] - rows[b]).item()
            rms = np.sqrt(((small[a] - small[b]) ** 2).mean())
            assert 1 - PIXELS.similarity(distance) == pytest.approx(rms, rel=1e-4, abs=1e-7)
