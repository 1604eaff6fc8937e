"""The benchmark of mitigation: what its critic counts, against what is plainly right."""

import numpy as np
import torch
from mitigation_pictures import Critic, Drawn, kernel_distance
from PIL import Image
from unmemorize.shared.copies.features import PIXELS
from unmemorize.shared.copies.neighbours import TrainingImages


def picture(seed: int, contrast: float = 1.0) -> Image.Image:
    """Return coarse colour patches, less of them with less contrast."""
    cells = np.random.default_rng(seed).normal(0, 60 * contrast, (8, 8, 3)) + 128
    return Image.fromarray(cells.clip(0, 255).astype(np.uint8).repeat(8, 0).repeat(8, 1))


def drawn(caption: str, *images: Image.Image) -> Drawn:
    return Drawn(caption=caption, images=[*images], seconds=1.0, acted=True, score_after=None)


def critic() -> Critic:
    """Return a critic of 30 training images and 24 other prompts, without SSCD or drawings."""
    made = object.__new__(Critic)
    made.training = TrainingImages(
        PIXELS.rows([picture(i) for i in range(30)]), [f"caption {i}" for i in range(30)]
    )
    made.others = [(f"other {i}", picture(100 + i)) for i in range(24)]
    made.other_rows = PIXELS.rows([image for _, image in made.others])
    made.least = Critic.least_of(made.others)
    return made


def test_copies_of_any_training_image_count():
    ways = [drawn("caption 3", picture(3), picture(7), picture(200))]  # own, another's, none
    assert critic().copied(ways) == [True, True, False]


def test_blank_is_what_has_less_contrast_or_detail_than_other_prompts_images():
    smooth = picture(4).resize((2, 2)).resize((64, 64), Image.Resampling.BICUBIC)
    flat = Image.new("RGB", (64, 64), (90, 90, 90))
    ways = [drawn("caption 3", picture(3), picture(300, contrast=0.1), flat, smooth)]
    assert critic().blank(ways) == [False, True, True, True]


def test_the_kernel_distance_is_the_slow_one_and_nothing_between_equals():
    one, other = (torch.nn.functional.normalize(torch.randn(n, 6), dim=1) for n in (5, 7))

    def mean(a, b, skip):
        values = [
            (float(x @ y) + 1) ** 3
            for i, x in enumerate(a) for j, y in enumerate(b) if not (skip and i == j)
        ]  # fmt: skip
        return sum(values) / len(values)

    slow = mean(one, one, True) + mean(other, other, True) - 2 * mean(one, other, False)
    assert abs(kernel_distance(one, other) - slow) < 1e-5
    many = torch.nn.functional.normalize(torch.randn(400, 6), dim=1)
    assert abs(kernel_distance(many[:200], many[200:])) < 0.05
    assert kernel_distance(many[:200], (many[200:] + 1) / 2) > 0.5
